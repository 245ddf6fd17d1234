//! The web configuration file: what of exporter-toolkit's form is read, and that the rest is refused.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use snapwarden::config::web::{ClientAuth, parse};

/// Of `secret`, with the lowest cost.
pub(crate) const HASH: &str = "$2y$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW";

fn refused(text: &str) -> String {
    let said = parse(text, "web.yml", Path::new("/etc/x")).unwrap_err().to_string();
    assert!(!said.contains(&HASH[8..]), "{said}");
    said
}

#[test]
fn the_supported_keys_are_read_with_paths_beside_the_file() {
    let text = format!(
        "# a comment\ntls_server_config:\n  cert_file: server.crt\n  key_file: '/keys/server.key'\n  \
         client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: \"ca.crt\"\n  min_version: TLS13\n  \
         cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]\nhttp_server_config:\n  http2: false\n  headers:\n    \
         X-Frame-Options: deny\n    Strict-Transport-Security: max-age=3600\n    X-Content-Type-Options: nosniff\n\
         basic_auth_users:\n  prometheus: {HASH}\n  \"a b\": '{HASH}'\n"
    );
    let web = parse(&text, "web.yml", Path::new("/etc/x")).unwrap();
    let tls = web.tls.as_ref().unwrap();
    assert_eq!(
        (&tls.cert_file, &tls.key_file),
        (&PathBuf::from("/etc/x/server.crt"), &PathBuf::from("/keys/server.key"))
    );
    assert_eq!(tls.client_auth, Some((ClientAuth::Required, PathBuf::from("/etc/x/ca.crt"))));
    assert_eq!((tls.tls12, tls.tls13), (false, true));
    assert_eq!(tls.cipher_suites.as_deref(), Some(&["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"][..]));
    let headers =
        [("X-Frame-Options", "deny".to_owned()), ("Strict-Transport-Security", "max-age=3600".to_owned())];
    assert_eq!(web.headers, headers);
    assert_eq!(web.users.keys().collect::<Vec<_>>(), ["a b", "prometheus"]);
    assert!(web.users["prometheus"].fits(b"secret") && !web.users["prometheus"].fits(b"Secret"));
    assert!(!format!("{web:?}").contains(&HASH[8..]));

    let open = parse("http_server_config:\n  http2: false\n", "web.yml", Path::new("/")).unwrap();
    assert!(open.tls.is_none() && open.users.is_empty());
}

#[test]
fn the_rest_of_the_form_is_refused_by_name() {
    let tls = "tls_server_config:\n  cert_file: a\n  key_file: b\n";
    for (text, parts) in [
        ("rate_limit:\n  burst: 20\n".to_owned(), ["1:1: rate_limit: this is not supported", "take it out"]),
        (
            format!("{tls}  client_allowed_sans: [a]\n"),
            ["4:3: tls_server_config.client_allowed_sans", "not supported"],
        ),
        (
            format!("{tls}  key: |\n    -----BEGIN\n"),
            ["4:3: tls_server_config.key: ", "name it as `key_file`"],
        ),
        (format!("{tls}  curve_preferences: [X25519]\n"), ["curve_preferences", "not supported"]),
        (format!("{tls}  min_version: TLS10\n"), ["`TLS10` is not possible", "`\"TLS12\"` or `\"TLS13\"`"]),
        (
            format!("{tls}  client_auth_type: RequestClientCert\n"),
            ["is not possible", "RequireAndVerifyClientCert"],
        ),
        (
            format!("{tls}  cipher_suites: [TLS_RSA_WITH_AES_128_CBC_SHA]\n"),
            ["is not possible", "TLS_ECDHE_RSA"],
        ),
        (
            "http_server_config:\n  http2: true\n".to_owned(),
            ["2:10: http_server_config.http2", "HTTP/1.1 alone"],
        ),
        (
            "http_server_config:\n  headers:\n    Content-Security-Policy: x\n".to_owned(),
            ["3:5: http_server_config.headers.Content-Security-Policy", "sets its own"],
        ),
        (
            "http_server_config:\n  headers:\n    X-Content-Type-Options: sniff\n".to_owned(),
            ["`sniff` is not possible", "nosniff"],
        ),
    ] {
        let said = refused(&text);
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
        assert_eq!(said.matches("web.yml:").count(), 1, "{said}");
    }
}

#[test]
fn mistakes_are_all_said_at_once_with_their_places_and_without_secrets() {
    let text = format!(
        "tls_sever_config:\n  a: b\ntls_server_config:\n  cert_file: a\n  client_auth_type: VerifyClientCertIfGiven\n  \
         min_version: TLS13\n  max_version: TLS12\nbasic_auth_users:\n  a: T0PSECRET1\n  b:\n  c: [{HASH}]\n  d: $2b$16${}\n  a: x\n\
         e: {HASH}\n",
        &HASH[7..]
    );
    let said = refused(&text);
    assert!(!said.contains("T0PSECRET1"), "{said}");
    for part in [
        "web.yml:1:1: tls_sever_config: unknown key",
        "did you mean `tls_server_config`?",
        "tls_server_config: `key_file` is missing",
        "`client_ca_file` is missing",
        "web.yml:6:16: tls_server_config.min_version: it is later than `max_version`",
        "web.yml:9:6: basic_auth_users.a: this is no hash of a password by bcrypt",
        "htpasswd -nBC 10 NAME",
        "web.yml:10:3: b: there is no value",
        "web.yml:11:6: basic_auth_users.c: this is no hash",
        "web.yml:12:6: basic_auth_users.d: the cost of this hash is 16",
        "web.yml:13:3: a: this key is written twice",
        "web.yml:14:1: e: unknown key",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // Otherwise a password that was guessed from it would be in the log.
    assert!(refused(&format!("basic_auth_users: {HASH}\n")).contains("this is no mapping"));
}

#[test]
fn what_is_no_plain_yaml_is_refused_in_a_bounded_time() {
    let mut bomb = String::from("a0: &a0 x\n");
    for level in 1..20 {
        let _ = writeln!(bomb, "a{level}: &a{level} [{}]", format!("*a{}, ", level - 1).repeat(9));
    }
    for (text, part) in [
        (String::new(), "there is nothing in it"),
        ("# only a comment\n".to_owned(), "there is nothing in it"),
        ("---\n".to_owned(), "there is nothing in it"),
        ("- a\n".to_owned(), "this is no mapping"),
        ("a".to_owned(), "this is no mapping"),
        ("http_server_config:\n\thttp2: false\n".to_owned(), "this is no YAML"),
        ("basic_auth_users: {a: b\n".to_owned(), "this is no YAML"),
        ("http_server_config: {}\n---\nhttp_server_config: {}\n".to_owned(), "a second document begins"),
        ("http_server_config: !x {}\n".to_owned(), "there is a tag"),
        ("a: &x {}\nb: *x\n".to_owned(), "there is an anchor"),
        (bomb, "there is an anchor"),
        ("? [a]\n: b\n".to_owned(), "a key is no plain word"),
        (format!("a: {}{}", "[".repeat(20), "]".repeat(20)), "this is too deep"),
        (format!("a: {}{}", "{b: ".repeat(20), "}".repeat(20)), "this is too deep"),
        (format!("a: {}", "[".repeat(30_000)), "recursion limit exceeded"),
        (format!("a: {}", "{b: ".repeat(15_000)), "this is"),
    ] {
        let said = refused(&text);
        assert!(said.contains(part) && said.len() < 60_000, "{part}: {said}");
    }
}

#[test]
fn an_unknown_key_is_shown_without_the_hash_behind_it() {
    for key in ["alice:", "alice :", "\"alice\" :", "'a b':", ":", "basic_auth_users: {}\nalice  :"] {
        let said = refused(&format!("{key} {HASH}\n"));
        assert!(said.contains("unknown key") && !said.contains("$2y$"), "{said}");
    }
}
