//! Single exchanges of the client over real HTTP: what is sent on the wire, and how responses are read.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use secrecy::ExposeSecret;
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::credentials::Credentials;
use snapwarden::exoscale::client::{Client, Settings, ZoneClient};
use snapwarden::exoscale::error::ErrorKind;
use snapwarden::exoscale::wire::Deleted;
use snapwarden::exoscale::wire::PromoteRequest;
use snapwarden::randomness::SystemRandomness;
use snapwarden::snapshot::{InstanceId, SnapshotId};
use snapwarden::text::chain;
use snapwarden::transport::HttpTransport;
use wiremock::matchers::{body_string, header, header_regex, method, path, query_param};
use wiremock::{Match, Mock, MockServer, Request, ResponseTemplate};

const SNAPSHOT: &str = "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105";
const INSTANCE: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
const OPERATION: &str = "e2047130-b86e-11ef-83b3-0d8312b2c2d7";
const SIGNED: &str = r"^EXO2-HMAC-SHA256 credential=EXO1,expires=\d{10},signature=[A-Za-z0-9+/]{43}=$";

fn client(server: &MockServer) -> Client {
    let settings = Settings {
        endpoint: format!("{}/v2", server.uri()),
        request_timeout: Duration::from_secs(30),
        poll_interval: Duration::from_millis(1),
        operation_timeout: Duration::from_secs(30),
        requests_per_second: 1000.try_into().unwrap(),
        shards: std::num::NonZeroU32::MIN,
        concurrency: 4.try_into().unwrap(),
    };
    let credentials = Credentials::new("EXO1", "hush", None).unwrap();
    Client::new(
        settings,
        Some(credentials),
        Arc::new(HttpTransport::default()),
        Arc::new(SystemClock::start()),
        Arc::new(SystemRandomness),
    )
}

fn zone(server: &MockServer) -> ZoneClient {
    client(server).zone(&"ch-gva-2".parse().unwrap())
}

fn snapshot() -> SnapshotId {
    SNAPSHOT.parse().unwrap()
}

fn operation(state: &str) -> ResponseTemplate {
    let body = serde_json::json!({ "id": OPERATION, "state": state, "reference": { "id": SNAPSHOT, "link": "/v2/x" } });
    ResponseTemplate::new(200).set_body_json(body)
}

/// Whether a request lacks a header.
struct Without(&'static str);

impl Match for Without {
    fn matches(&self, request: &Request) -> bool {
        !request.headers.contains_key(self.0)
    }
}

#[tokio::test]
async fn a_listing_is_asked_for_with_a_signature_and_read() {
    let server = MockServer::start().await;
    let body = serde_json::json!({ "snapshots": [{
        "id": SNAPSHOT, "name": "web-1_ROOT-1_20261101023000", "created-at": "2026-11-01T02:30:00Z",
        "state": "exported", "size": 50, "application-consistent": false, "instance": { "id": INSTANCE },
    }] });
    Mock::given(method("GET"))
        .and(path("/v2/snapshot"))
        .and(header("accept", "application/json"))
        .and(header_regex("authorization", SIGNED))
        .and(Without("content-type"))
        .respond_with(
            ResponseTemplate::new(200)
                .insert_header("date", "Sun, 01 Nov 2026 02:31:00 GMT")
                .set_body_json(body),
        )
        .expect(1)
        .mount(&server)
        .await;
    let (listing, clock_skew) = zone(&server).list_snapshots().await.unwrap();
    let found = &listing.snapshots[0];
    assert!(found.state.is_good());
    assert_eq!((found.id, found.size_gib), (snapshot(), Some(50)));
    assert_eq!(found.instance_id, Some(INSTANCE.parse::<InstanceId>().unwrap()));
    assert_eq!(&*listing.mentioned[0].name, INSTANCE);
    let date = "2026-11-01T02:31:00Z".parse().unwrap();
    let off = SystemClock::start().now().duration_since(date) - clock_skew.unwrap();
    assert!(off.abs() < SignedDuration::from_mins(1), "{off}");
}

#[tokio::test]
async fn a_post_without_a_body_has_a_content_length_of_zero_and_no_content_type() {
    let server = MockServer::start().await;
    Mock::given(method("POST"))
        .and(path(format!("/v2/snapshot/{SNAPSHOT}:export")))
        .and(header("content-length", "0"))
        .and(header_regex("authorization", SIGNED))
        .and(Without("content-type"))
        .and(Without("transfer-encoding"))
        .respond_with(operation("pending"))
        .expect(1)
        .mount(&server)
        .await;
    Mock::given(method("GET"))
        .and(path(format!("/v2/operation/{OPERATION}")))
        .and(header_regex("authorization", SIGNED))
        .respond_with(operation("success"))
        .expect(1)
        .mount(&server)
        .await;
    let done = zone(&server).export_snapshot(snapshot()).await.unwrap();
    assert_eq!(done.reference, Some(snapshot().0));
}

#[tokio::test]
async fn a_post_with_a_body_is_json() {
    let server = MockServer::start().await;
    Mock::given(method("POST"))
        .and(path(format!("/v2/snapshot/{SNAPSHOT}:promote")))
        .and(header("content-type", "application/json"))
        .and(body_string(r#"{"name":"café","password-enabled":false}"#))
        .respond_with(operation("success"))
        .expect(1)
        .mount(&server)
        .await;
    let request = PromoteRequest {
        name: "café".to_owned(),
        description: None,
        default_user: None,
        ssh_key_enabled: None,
        password_enabled: Some(false),
    };
    zone(&server).promote_snapshot(snapshot(), &request).await.unwrap();
}

#[tokio::test]
async fn point_31_a_deletion_is_sent_once_and_404_is_done() {
    let server = MockServer::start().await;
    Mock::given(method("DELETE"))
        .and(path(format!("/v2/snapshot/{SNAPSHOT}")))
        .and(header_regex("authorization", SIGNED))
        .respond_with(ResponseTemplate::new(404).set_body_string(r#"{"message":"not found"}"#))
        .expect(1)
        .mount(&server)
        .await;
    assert_eq!(zone(&server).delete_snapshot(snapshot()).await.unwrap(), Deleted::AlreadyGone);
}

#[tokio::test]
async fn a_refusal_for_too_many_requests_is_followed_by_a_second_try() {
    let server = MockServer::start().await;
    Mock::given(path("/v2/instance"))
        .respond_with(ResponseTemplate::new(429).insert_header("retry-after", "0"))
        .up_to_n_times(1)
        .expect(1)
        .mount(&server)
        .await;
    Mock::given(path("/v2/instance"))
        .respond_with(ResponseTemplate::new(200).set_body_string(r#"{"instances":[]}"#))
        .expect(1)
        .mount(&server)
        .await;
    assert_eq!(zone(&server).list_instances().await.unwrap(), []);
}

#[tokio::test]
async fn after_a_refused_signature_nothing_more_is_sent() {
    let server = MockServer::start().await;
    Mock::given(method("POST"))
        .respond_with(
            ResponseTemplate::new(403).set_body_string(r#"{"message":"Invalid request signature"}"#),
        )
        .expect(1)
        .mount(&server)
        .await;
    let error = zone(&server).create_snapshot(INSTANCE.parse().unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Credentials);
    assert!(!error.may_have_happened());
    assert!(chain(&error).contains("clock"), "{}", chain(&error));
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let server = MockServer::start().await;
    Mock::given(path("/v2/snapshot"))
        .respond_with(ResponseTemplate::new(302).insert_header("location", "/elsewhere"))
        .expect(1)
        .mount(&server)
        .await;
    let error = zone(&server).list_snapshots().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
}

#[tokio::test]
async fn zones_are_listed_without_a_signature_and_templates_by_a_signed_query() {
    let server = MockServer::start().await;
    Mock::given(path("/v2/zone"))
        .and(Without("authorization"))
        .respond_with(ResponseTemplate::new(200).set_body_string(r#"{"zones":[{"name":"ch-gva-2"}]}"#))
        .expect(1)
        .mount(&server)
        .await;
    Mock::given(path("/v2/template"))
        .and(query_param("visibility", "private"))
        .and(header_regex("authorization", "credential=EXO1,signed-query-args=visibility,expires="))
        .respond_with(ResponseTemplate::new(200).set_body_string("{}"))
        .expect(1)
        .mount(&server)
        .await;
    assert_eq!(client(&server).list_zones(&"ch-gva-2".parse().unwrap()).await.unwrap().0.len(), 1);
    assert_eq!(zone(&server).list_templates().await.unwrap(), []);
}

#[tokio::test]
async fn an_address_of_an_export_is_read_and_never_shown() {
    let server = MockServer::start().await;
    let body = serde_json::json!({
        "id": SNAPSHOT, "created-at": "2026-11-01T02:30:00Z", "state": "exported",
        "export": { "presigned-url": "https://sos/x?X-Amz-Signature=hush", "md5sum": "ab" },
    });
    Mock::given(path(format!("/v2/snapshot/{SNAPSHOT}")))
        .respond_with(ResponseTemplate::new(200).set_body_json(body))
        .expect(1)
        .mount(&server)
        .await;
    let details = zone(&server).get_snapshot(snapshot()).await.unwrap().unwrap();
    assert!(!format!("{details:?}").contains("hush"));
    let export = details.export.unwrap();
    assert!(export.presigned_url.expose_secret().ends_with("hush"));
}
