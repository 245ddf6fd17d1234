//! What get-instance says beside the listing, decoded into what a manifest keeps.
//!
//! ```json
//! {"id": "9ee8cb98-…", "state": "running", "disk-size": 50, "instance-type": {"id": "21624abb-…"},
//!  "security-groups": [{"id": "…"}], "private-networks": [{"id": "…", "mac-address": "…"}],
//!  "elastic-ips": [{"id": "…"}], "anti-affinity-groups": [{"id": "…"}], "deploy-target": {"id": "…"},
//!  "ssh-keys": [{"name": "alice"}], "secureboot-enabled": true, "tpm-enabled": false, "public-ip-assignment": "inet4",
//!  "public-ip": "192.0.2.7", "application-consistent-snapshot-enabled": true, "user-data": "I2Nsb3VkLWNvbmZpZwo=",
//!  "manager": {"id": "…", "type": "instance-pool"}}
//! ```
//!
//! Whatever is missing or of another shape is none: an export must not fail for it. What is longer than the API itself allows
//! is left out rather than cut, since half a name names something else.

use serde_json::Value;
use uuid::Uuid;

use crate::snapshot::{Attached, Machine, Manager};

/// The API's limit of every name, in characters.
const TEXT_MAX: usize = 255;

/// The API's limit of user data, in characters of base64.
const USER_DATA_MAX: usize = 32_768;

/// More groups, networks, addresses or keys than any instance has.
const ENTRIES_MAX: usize = 100;

/// A text that the API's own limits allow, unless it is empty.
pub(super) fn short_text(text: &str) -> Option<String> {
    (1..=TEXT_MAX).contains(&text.chars().take(TEXT_MAX + 1).count()).then(|| text.to_owned())
}

/// Family and size of an instance type, such as `standard.medium`, if both are given.
pub(super) fn type_name(body: &Value) -> Option<String> {
    let part = |name: &str| body.get(name)?.as_str().filter(|text| is_word(text));
    Some(format!("{}.{}", part("family")?, part("size")?))
}

/// Families and sizes are words, such as `gpu3080ti`.
fn is_word(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Reads an instance, and the names of the fields of which something was too long or too many.
pub(super) fn machine_of(body: &Value) -> (Machine, Vec<&'static str>) {
    let mut fields = Fields { body, left_out: Vec::new() };
    let instance_type = body.get("instance-type").unwrap_or(&Value::Null);
    let ssh_keys = fields.names("ssh-keys");
    // Its older form, for one key alone.
    let ssh_keys =
        if ssh_keys.is_empty() { fields.name_in("ssh-key").into_iter().collect() } else { ssh_keys };
    let machine = Machine {
        instance_type: type_name(instance_type),
        instance_type_id: id_of(instance_type),
        disk_size_gib: body.get("disk-size").and_then(Value::as_u64),
        security_groups: fields.attached("security-groups", "name"),
        private_networks: fields.attached("private-networks", "name"),
        elastic_ips: fields.attached("elastic-ips", "ip"),
        anti_affinity_groups: fields.attached("anti-affinity-groups", "name"),
        deploy_target: body.get("deploy-target").and_then(|entry| fields.one(entry, "deploy-target", "name")),
        ssh_keys,
        secure_boot: fields.flag("secureboot-enabled"),
        tpm: fields.flag("tpm-enabled"),
        public_ip_assignment: fields.text("public-ip-assignment"),
        application_consistent_snapshots: fields.flag("application-consistent-snapshot-enabled"),
        manager: fields.manager(),
        user_data: fields.user_data(),
    };
    (machine, fields.left_out)
}

fn id_of(entry: &Value) -> Option<Uuid> {
    Uuid::parse_str(entry.get("id")?.as_str()?).ok()
}

struct Fields<'a> {
    body: &'a Value,
    left_out: Vec<&'static str>,
}

impl Fields<'_> {
    fn leave_out(&mut self, field: &'static str) {
        if !self.left_out.contains(&field) {
            self.left_out.push(field);
        }
    }

    fn flag(&self, field: &str) -> Option<bool> {
        self.body.get(field)?.as_bool()
    }

    /// A text of this field, where it is not too long.
    fn short(&mut self, field: &'static str, text: Option<&str>) -> Option<String> {
        let text = text.filter(|text| !text.is_empty())?;
        let short = short_text(text);
        if short.is_none() {
            self.leave_out(field);
        }
        short
    }

    fn text(&mut self, field: &'static str) -> Option<String> {
        self.short(field, self.body.get(field).and_then(Value::as_str))
    }

    fn name_in(&mut self, field: &'static str) -> Option<String> {
        self.short(field, self.body.get(field).and_then(|entry| entry.get("name")?.as_str()))
    }

    /// The entries of a list, as many as are kept.
    fn entries(&mut self, field: &'static str) -> Vec<Value> {
        let all = self.body.get(field).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let kept = all.iter().take(ENTRIES_MAX).cloned().collect();
        if all.len() > ENTRIES_MAX {
            self.leave_out(field);
        }
        kept
    }

    fn names(&mut self, field: &'static str) -> Vec<String> {
        let entries = self.entries(field);
        let name = |entry: &Value| self.short(field, entry.get("name").and_then(Value::as_str));
        entries.iter().filter_map(name).collect()
    }

    fn attached(&mut self, field: &'static str, name: &str) -> Vec<Attached> {
        let entries = self.entries(field);
        entries.iter().filter_map(|entry| self.one(entry, field, name)).collect()
    }

    fn one(&mut self, entry: &Value, field: &'static str, name: &str) -> Option<Attached> {
        let id = id_of(entry)?;
        Some(Attached { id, name: self.short(field, entry.get(name).and_then(Value::as_str)) })
    }

    fn manager(&mut self) -> Option<Manager> {
        let entry = self.body.get("manager")?;
        let kind = self.short("manager", entry.get("type").and_then(Value::as_str));
        let manager = Manager { id: id_of(entry), kind };
        (manager.id.is_some() || manager.kind.is_some()).then_some(manager)
    }

    fn user_data(&mut self) -> Option<String> {
        let text = self.body.get("user-data")?.as_str().filter(|text| !text.is_empty())?;
        let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
        if text.len() <= USER_DATA_MAX && text.bytes().all(is_base64) {
            return Some(text.to_owned());
        }
        self.leave_out("user-data");
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ID: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";

    #[test]
    fn all_that_an_instance_is_built_of_is_read() {
        let attached = json!([{ "id": ID }]);
        let (machine, left_out) = machine_of(&json!({
            "instance-type": { "id": ID, "family": "standard", "size": "medium" },
            "disk-size": 50, "security-groups": [{ "id": ID, "name": "web" }], "private-networks": attached,
            "elastic-ips": [{ "id": ID, "ip": "192.0.2.9" }], "anti-affinity-groups": attached,
            "deploy-target": { "id": ID }, "ssh-keys": [{ "name": "alice", "fingerprint": "…" }],
            "secureboot-enabled": true, "tpm-enabled": false, "public-ip-assignment": "dual",
            "application-consistent-snapshot-enabled": true, "user-data": "I2Nsb3Vk",
            "manager": { "id": ID, "type": "sks-nodepool" },
        }));
        let id: Uuid = ID.parse().unwrap();
        let plain = Attached { id, name: None };
        let named = |name: &str| Attached { id, name: Some(name.to_owned()) };
        let expected = Machine {
            instance_type: Some("standard.medium".to_owned()),
            instance_type_id: Some(id),
            disk_size_gib: Some(50),
            security_groups: vec![named("web")],
            private_networks: vec![plain.clone()],
            elastic_ips: vec![named("192.0.2.9")],
            anti_affinity_groups: vec![plain.clone()],
            deploy_target: Some(plain),
            ssh_keys: vec!["alice".to_owned()],
            secure_boot: Some(true),
            tpm: Some(false),
            public_ip_assignment: Some("dual".to_owned()),
            application_consistent_snapshots: Some(true),
            manager: Some(Manager { id: Some(id), kind: Some("sks-nodepool".to_owned()) }),
            user_data: Some("I2Nsb3Vk".to_owned()),
        };
        assert_eq!((machine, left_out), (expected, vec![]));
    }

    #[test]
    fn an_older_answer_has_one_ssh_key() {
        let (machine, _) = machine_of(&json!({ "ssh-key": { "name": "alice" } }));
        assert_eq!(machine.ssh_keys, ["alice"]);
    }

    #[test]
    fn whatever_the_answer_is_it_is_read_and_what_it_has_is_bounded() {
        for odd in
            [json!(null), json!([]), json!("x"), json!({}), json!({ "instance-type": 3, "ssh-keys": {} })]
        {
            assert_eq!(machine_of(&odd), (Machine::default(), vec![]), "{odd}");
        }
        let long = "x".repeat(256);
        let (machine, left_out) = machine_of(&json!({
            "instance-type": { "id": "../x", "family": "standard; rm -rf ~", "size": "medium" },
            "ssh-keys": [{ "name": long }, { "name": "kept" }, 7],
            "security-groups": vec![json!({ "id": ID }); 101],
            "user-data": "a b",
            "disk-size": -1,
            "secureboot-enabled": "yes",
        }));
        assert_eq!(machine.ssh_keys, ["kept"]);
        assert_eq!(machine.security_groups.len(), 100);
        let rest = Machine { ssh_keys: Vec::new(), security_groups: Vec::new(), ..machine };
        assert_eq!(rest, Machine::default());
        assert_eq!(left_out, ["ssh-keys", "security-groups", "user-data"]);
        let (machine, left_out) = machine_of(&json!({ "user-data": "A".repeat(USER_DATA_MAX + 1) }));
        assert_eq!((machine.user_data, left_out), (None, vec!["user-data"]));
    }
}
