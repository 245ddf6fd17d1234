//! What `deploy` holds: its configurations are valid, and what stands there twice is the same.

use std::process::Command;

use snapwarden::config;
use snapwarden::policy::shard::Shard;

/// The indented block after a line that ends with `key`, without its indentation.
fn block(text: &str, key: &str) -> String {
    let (_, after) = text.split_once(&format!("{key}: |\n")).unwrap();
    let indent = after.len() - after.trim_start().len();
    let lines =
        after.lines().take_while(|line| line.trim().is_empty() || line.starts_with(&" ".repeat(indent)));
    lines.flat_map(|line| [line.get(indent..).unwrap_or_default(), "\n"]).collect()
}

#[test]
fn the_configurations_of_the_manifests_are_valid() {
    let overlay = include_str!("../../deploy/kubernetes/base/configuration.yaml");
    let chart = include_str!("../../deploy/helm/snapwarden/values.yaml");
    for (name, text) in
        [("overlay", block(overlay, "snapwarden.toml")), ("chart", block(chart, "configuration"))]
    {
        let config =
            config::parse(&text, name, None).unwrap_or_else(|error| panic!("{name}: {error}\n{text}"));
        assert!(config.policies.len() == 1 && text.contains("0.0.0.0:9788"), "{text}");
    }
}

#[test]
fn the_operator_s_rules_and_those_of_the_chart_are_the_rules_of_prometheus() {
    let rules = include_str!("../../config/prometheus/snapwarden.rules.yml");
    let groups = &rules[rules.find("groups:").unwrap()..];
    assert_eq!(
        include_str!("../../deploy/helm/snapwarden/files/groups.yaml"),
        groups,
        "deploy/copy_rules.py"
    );
    let of_operator = include_str!("../../deploy/kubernetes/monitoring/prometheusrule.yaml");
    assert_eq!(block(&of_operator.replace("spec:\n", "spec: |\n"), "spec"), groups, "deploy/copy_rules.py");
}

#[test]
fn every_manifest_is_judged_by_schemas_that_refuse_unknown_fields() {
    let Ok(python) = std::env::var("SNAPWARDEN_DEPLOY_PYTHON") else {
        crate::stage::skipped(format_args!(
            "SNAPWARDEN_DEPLOY_PYTHON names no Python with what deploy/validate.py needs"
        ));
        return;
    };
    let mut command = Command::new(python);
    command.arg("deploy/validate.py").current_dir(env!("CARGO_MANIFEST_DIR"));
    if let Ok(npm) = std::env::var("SNAPWARDEN_DEPLOY_NPM") {
        command.args(["--npm", &npm]);
    }
    let said = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success(), "{text}");
}

#[test]
fn the_indexed_job_has_a_pod_for_each_shard() {
    let job = include_str!("../../deploy/kubernetes/shards/cronjob.yaml");
    let after = |key: &str| {
        let (_, rest) = job.split_once(key).unwrap_or_else(|| panic!("{key}"));
        rest.lines().next().unwrap().trim().trim_matches('"').to_owned()
    };
    let pods = after("\n      completions:");
    assert_eq!(after("name: SNAPWARDEN_SHARDS\n                  value:"), pods);
    format!("0/{pods}").parse::<Shard>().unwrap();
}
