#!/usr/bin/env python3
"""Writes what stands in more than one form: the alert rules as a PrometheusRule, and the chart's copy of them.

    python3 deploy/copy_rules.py
"""
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
rules = (ROOT / "config/prometheus/snapwarden.rules.yml").read_text()
groups = rules[rules.index("groups:"):]
indented = "".join(f"  {line}\n" if line else "\n" for line in groups.splitlines())
(ROOT / "deploy/kubernetes/monitoring/prometheusrule.yaml").write_text(f"""\
# From config/prometheus/snapwarden.rules.yml, by deploy/copy_rules.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: snapwarden
spec:
{indented}""")
(ROOT / "deploy/helm/snapwarden/files/groups.yaml").write_text(groups)
