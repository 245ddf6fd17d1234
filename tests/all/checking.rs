//! What `check --online` tries, and how it says what is wrong.

use std::collections::BTreeSet;

use jiff::SignedDuration;
use snapwarden::disk::{Access, Disk as _, RealDisk};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::world::{API_KEY, API_SECRET};

use crate::command_line::{Play, end_of, is_there, set_mode, write};
use crate::s3::Server;
use crate::stage::{NIGHTLY, Said};

/// The result of one row of `check --online --output json`; empty if it is ok.
fn result(said: &Said, place: &str, what: &str) -> String {
    let checked = said.json();
    let rows = checked["online"].as_array().unwrap();
    let found = rows.iter().find(|row| row["where"] == place && row["what"] == what);
    let found = found.unwrap_or_else(|| panic!("no row {place}, {what}: {checked:#}"));
    found["error"].as_str().unwrap_or_default().to_owned()
}

/// What was tried at a place.
fn tried(said: &Said, place: &str) -> Vec<String> {
    let checked = said.json();
    let rows = checked["online"].as_array().unwrap().iter().filter(|row| row["where"] == place);
    rows.map(|row| row["what"].as_str().unwrap().to_owned()).collect()
}

const CHECK: [&str; 4] = ["check", "--online", "--output", "json"];

#[tokio::test(flavor = "multi_thread")]
async fn a_zone_that_does_not_exist_is_named_with_the_nearest_one_and_asked_nothing_else() {
    let (play, _) = Play::five(&NIGHTLY.replace("\"ch-gva-2\"", "\"ch-gva2\"")).await;
    let said = play.run(&CHECK).await;
    assert_eq!(said.status, 1, "{said:?}");
    let found = &said.json()["online"][0]["note"];
    assert_eq!(found, "found in `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`");
    let why = "zone `ch-gva2` does not exist; did you mean `ch-gva-2`?";
    assert_eq!(result(&said, "zone ch-gva2", "list-zones"), why);
    assert_eq!(tried(&said, "zone ch-gva2"), ["list-zones"]);
    let asked: Vec<Call> = play.world.log().iter().map(|exchange| exchange.call).collect();
    assert_eq!(asked, [Call::ListZones, Call::ListZones], "the zone itself, and the best-known one");

    play.world.add_zone("de-fra-1");
    play.world.clear_log();
    play.configure(&NIGHTLY.replace("\"ch-gva-2\"", "\"ch-gva-2\", \"nowhere\""));
    let said = play.run(&CHECK).await;
    assert_eq!(said.status, 1, "{said:?}");
    let why = "zone `nowhere` does not exist; there are ch-gva-2, de-fra-1";
    assert_eq!(result(&said, "zone nowhere", "list-zones"), why);
    assert_eq!(result(&said, "zone ch-gva-2", "list-zones"), "");
    assert_eq!(result(&said, "zone ch-gva-2", "delete-snapshot"), "");
    let lost = play.world.log().into_iter().filter(|exchange| exchange.zone.as_str() == "nowhere");
    assert!(lost.count() <= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zone_that_can_not_be_reached_is_tried_once_and_has_one_line() {
    let (play, _) = Play::five(NIGHTLY).await;
    // Nothing listens there.
    play.configure_with("endpoint = \"http://127.0.0.1:1/{zone}/v2\"", NIGHTLY);
    let said = play.run(&CHECK).await;
    assert_eq!(said.status, 1, "{said:?}");
    assert_eq!(tried(&said, "zone ch-gva-2"), ["list-zones"]);
    let why = result(&said, "zone ch-gva-2", "list-zones");
    assert!(why.contains("no connection") && !why.contains("attempts"), "{why}");
    assert!(why.ends_with("; nothing else of this zone was tried"), "{why}");
    let warnings = said.json()["warnings"].to_string();
    assert!(warnings.contains("whether each instance has a good snapshot was not tried"), "{warnings}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_differs_from_the_apis_is_named_with_the_limit() {
    let (play, _) = Play::five(NIGHTLY).await;
    assert_eq!(result(&play.run(&CHECK).await, "zone ch-gva-2", "clock"), "");
    let skewed = Effect::DateSkew(SignedDuration::from_mins(-20));
    play.world.fault(Fault::on(Call::ListZones, skewed));
    let said = play.run(&CHECK).await;
    assert_eq!(said.status, 1, "{said:?}");
    let why = result(&said, "zone ch-gva-2", "clock");
    assert!(why.starts_with("this machine's clock is 20m"), "{why}");
    assert!(why.contains(" ahead of the API's, more than max_clock_skew = 5m"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_is_tried_by_a_file_that_is_not_left_there() {
    let (play, _) = Play::five(NIGHTLY).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    let vault = play.path("vault");
    let left = vault.join("snapwarden-archive.json.probe");
    write(&left, "half of it");
    let before = play.run(&["archive", "list"]).await;
    assert_eq!(before.status, 0, "{before:?}");
    let said = play.run(&CHECK).await;
    assert_eq!(said.status, 0, "{said:?}");
    assert_eq!(tried(&said, "archive vault"), ["read", "write", "read back", "delete", "free space"]);
    assert!(!is_there(&left), "one that a crash left is cleaned up");
    assert_eq!(play.run(&["archive", "list"]).await.out, before.out);

    // Not there: nothing is written into what may be the folder below a mount.
    RealDisk.remove_file(&vault.join("snapwarden-archive.json")).unwrap();
    let said = play.run(&CHECK).await;
    assert_eq!(said.status, 1, "{said:?}");
    assert_eq!(tried(&said, "archive vault"), ["read"]);

    // A probe that can't be replaced stands for an archive that can't be written.
    let (play, _) = Play::five(NIGHTLY).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    RealDisk.create_dir_all(&play.path("vault/snapwarden-archive.json.probe.new"), Access::Owner).unwrap();
    let said = play.run(&CHECK).await;
    assert_eq!(said.status, 1, "{said:?}");
    let why = result(&said, "archive vault", "write");
    assert!(why.starts_with("write ") && why.contains("snapwarden-archive.json.probe"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_everybody_may_read_is_named_also_without_the_network() {
    let (play, _) = Play::five(NIGHTLY).await;
    let secret = play.path("credentials");
    write(&secret, &format!("api_key={API_KEY}\napi_secret={API_SECRET}\n"));
    let policies = NIGHTLY.to_owned();
    play.configure_with(&format!("credentials_file = \"{}\"", secret.display()), &policies);
    let warned = || async { end_of(play.stranger(&["check"])).await.out.contains("chmod 600") };
    assert!(!warned().await);
    set_mode(&secret, 0o644);
    assert!(warned().await);
    end_of(play.stranger(&["check"])).await.has(&[&format!("chmod 600 {}", secret.display())]);
}

/// The operations that a printed role allows.
fn allowed(said: &Said) -> BTreeSet<String> {
    assert_eq!(said.status, 0, "{said:?}");
    let role = said.json();
    assert_eq!(role["default-service-strategy"], "deny");
    let rules = &role["services"]["compute"]["rules"];
    let expression = rules[0]["expression"].as_str().unwrap();
    let list = expression.strip_prefix("operation in ['").unwrap().strip_suffix("']").unwrap();
    list.split("', '").map(str::to_owned).collect()
}

const EVERYTHING: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
create = true
[policies.nightly.retention]
keep_last = 1
[policies.nightly.guard]
settle = "0s"
[policies.nightly.export]
archives = ["vault"]
[policies.nightly.promote]
name = "{instance}-{snapshot}"
keep = 1
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_printed_role_allows_what_runs_need_and_nothing_else() {
    let keeps = EVERYTHING.replace("keep = 1\n", "");
    let retention = "[policies.nightly.retention]\nkeep_last = 1\n";
    let keeps = keeps.replace(retention, "");
    let prunes = format!(
        "[policies.nightly]\nzones = [\"ch-gva-2\"]\n{retention}[policies.nightly.guard]\nsettle = \"0s\"\n"
    );
    for (policies, part) in [(EVERYTHING, ""), (&keeps, "keeper"), (&prunes, "pruner"), (&prunes, "restorer")]
    {
        let (play, ids) = Play::five(policies).await;
        let whole = allowed(&end_of(play.stranger(&["check", "--print-role"])).await);
        let role = match part {
            "" => whole,
            part => allowed(&end_of(play.stranger(&["check", "--print-role", part])).await),
        };
        assert!(play.world.log().is_empty(), "it needs no network");
        if part == "keeper" {
            play.configure(EVERYTHING);
            assert_eq!(role, allowed(&end_of(play.stranger(&["check", "--print-role", part])).await));
            assert!(!role.iter().any(|operation| operation.starts_with("delete-")), "{role:?}");
            play.configure(policies);
        }
        let may: Vec<Call> = role.iter().map(|operation| Call::named(operation).unwrap()).collect();
        play.world.add_key("EXOrole", "role-secret", &may);
        let name = ids[0].short();
        let commands: &[&[&str]] = match part {
            "restorer" => {
                &[&["promote", &name, "--zone", "ch-gva-2", "--name", "golden"], &["revert", &name, "--yes"]]
            }
            _ => &[&["once"], &["once"]],
        };
        for arguments in commands {
            let mut command = play.stranger(arguments);
            command.env("EXOSCALE_API_KEY", "EXOrole").env("EXOSCALE_API_SECRET", "role-secret");
            let said = end_of(command).await;
            assert_eq!(said.status, 0, "{part}: {said:?}");
        }
        let log = play.world.log();
        let refused =
            log.iter().find(|exchange| exchange.status().is_some_and(|status| status.as_u16() == 403));
        assert!(refused.is_none(), "{part}: {refused:?}");
        let used: BTreeSet<String> = log.iter().map(|exchange| exchange.call.as_str().to_owned()).collect();
        let unused: Vec<&str> = role.difference(&used).map(String::as_str).collect();
        // Not used by this zone, whose operations end at once, and where nobody else deletes anything; nor by a restore without
        // a bucket.
        let rare = [
            "get-operation",
            "list-events",
            "list-instances",
            "list-templates",
            "register-template",
            "reset-instance",
        ];
        assert!(unused.iter().all(|one| rare.contains(one)), "{part}: {unused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_can_not_be_reached_is_tried_once_and_has_one_line() {
    let (play, _) = Play::five("").await;
    // Nothing listens there.
    let bucket = "[archives.offsite]\ntype = \"s3\"\nendpoint = \"http://127.0.0.1:1\"\nregion = \"r\"\nbucket = \"backups\"\n";
    play.configure(&format!("{bucket}{}", NIGHTLY.replace("\"vault\"", "\"offsite\"")));
    let mut command = play.command(&CHECK);
    command.env("AWS_ACCESS_KEY_ID", "EXO1").env("AWS_SECRET_ACCESS_KEY", "hush-hush-hush");
    let said = end_of(command).await;
    assert_eq!(said.status, 1, "{said:?}");
    assert_eq!(tried(&said, "archive offsite"), ["read"]);
    let why = result(&said, "archive offsite", "read");
    assert!(why.contains("no connection") && !why.contains("attempts"), "{why}");
    assert!(why.ends_with("; nothing else of this archive was tried"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_is_tried_and_its_versioning_is_told() {
    let Some(mut server) = Server::start() else { return };
    let (play, _) = Play::five("").await;
    let bucket = format!(
        "[archives.offsite]\ntype = \"s3\"\nendpoint = \"{}\"\nregion = \"us-east-1\"\nbucket = \"bucket\"\n\
         prefix = \"snapwarden/\"\n[archives.offsite.retention]\nkeep_last = 3\n",
        server.endpoint
    );
    play.configure(&format!("{bucket}{}", NIGHTLY.replace("\"vault\"", "\"offsite\"")));
    let check = || async {
        let mut command = play.command(&CHECK);
        command.env("AWS_ACCESS_KEY_ID", "EXO1").env("AWS_SECRET_ACCESS_KEY", "hush-hush-hush");
        end_of(command).await
    };
    let said = check().await;
    assert_eq!(said.status, 0, "{said:?}");
    let all = ["read", "write", "read back", "delete", "versioning", "object lock"];
    assert_eq!(tried(&said, "archive offsite"), all);
    assert!(server.keys().is_empty(), "{:?}", server.keys());
    assert!(!said.json()["warnings"].to_string().contains("keeps the versions"), "{said:?}");

    server.keep_versions();
    let said = check().await;
    assert_eq!(said.status, 0, "{said:?}");
    let warnings = said.json()["warnings"].to_string();
    assert!(warnings.contains("archive `offsite`: its bucket keeps the versions"), "{warnings}");
}
