//! The simulated zone, by HTTP exchanges alone: in this process and over a socket it is the same.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, IF_RANGE, RANGE, RETRY_AFTER,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use sha2::Sha256;
use snapwarden::clock::{Clock, timeout};
use snapwarden::sim::call::Call;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::fault::{Effect, Ending, Fault, When};
use snapwarden::sim::image::{DiskShape, Image};
use snapwarden::sim::world::{API_KEY, API_SECRET, World};
use snapwarden::snapshot::{InstanceId, SnapshotId, SnapshotState, ZoneName};
use snapwarden::transport::{
    HttpTransport, Purpose, Reached, Request, Response, Transport, TransportError, read_body,
};
use url::Url;

const SMALL: DiskShape = DiskShape { size_gib: 10, data_clusters: 4, cluster_bits: 12 };

/// A world with one instance that has one snapshot in `ch-gva-2`, an empty `de-fra-1`, and a client of it.
struct Stage {
    world: World,
    clock: SimClock,
    zone: ZoneName,
    other: ZoneName,
    instance: InstanceId,
    snapshot: SnapshotId,
    client: Client,
    in_process: bool,
}

struct Client {
    transport: Arc<dyn Transport>,
    /// With `{zone}`.
    endpoint: String,
    zone: ZoneName,
    key: &'static str,
    secret: &'static str,
    clock: SimClock,
}

fn arranged() -> Stage {
    let clock = SimClock::starting_at("2026-11-23T10:00:00Z".parse().unwrap());
    let world = World::new(Arc::new(clock.clone()), 1);
    let (zone, other) = (world.add_zone("ch-gva-2"), world.add_zone("de-fra-1"));
    let instance = world.add_instance(&zone, "web-1", &[("backup", "nightly")]);
    world.set_disk(instance, SMALL);
    let snapshot = world.add_snapshot(instance, "2026-11-22T02:30:00Z".parse().unwrap());
    let client = Client {
        transport: world.transport(),
        endpoint: "https://api-{zone}.exoscale.com/v2".to_owned(),
        zone: zone.clone(),
        key: API_KEY,
        secret: API_SECRET,
        clock: clock.clone(),
    };
    Stage { world, clock, zone, other, instance, snapshot, client, in_process: true }
}

/// Tells a story in this process, and over a socket. Operations are settled at once: nobody waits.
async fn on_both(story: impl AsyncFn(&Stage)) {
    let stage = arranged();
    stage.world.set_operations_take(Duration::ZERO);
    story(&stage).await;

    let mut stage = arranged();
    stage.world.set_operations_take(Duration::ZERO);
    let served = stage.world.serve("127.0.0.1:0".parse().unwrap()).await.unwrap();
    stage.client.transport = Arc::new(HttpTransport::default());
    stage.client.endpoint = served.endpoint();
    stage.in_process = false;
    story(&stage).await;
}

impl Client {
    async fn send(&self, method: Method, path: &str, body: &str) -> Result<Response, TransportError> {
        let url =
            Url::parse(&format!("{}{path}", self.endpoint.replace("{zone}", self.zone.as_str()))).unwrap();
        let mut arguments: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        arguments.sort();
        let names: Vec<&str> = arguments.iter().map(|(name, _)| name.as_str()).collect();
        let values: String = arguments.iter().map(|(_, value)| value.as_str()).collect();
        let expires = self.clock.now().as_second() + 600;
        let message = format!("{method} {}\n{body}\n{values}\n\n{expires}", url.path());
        let mut mac = Hmac::<Sha256>::new_from_slice(self.secret.as_bytes()).unwrap();
        mac.update(message.as_bytes());
        let signature = STANDARD.encode(mac.finalize().into_bytes());
        let signed =
            if names.is_empty() { String::new() } else { format!("signed-query-args={},", names.join(";")) };
        let header = format!(
            "EXO2-HMAC-SHA256 credential={},{signed}expires={expires},signature={signature}",
            self.key
        );
        let headers = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::try_from(header).unwrap())]);
        self.exchange(method, url, headers, body).await
    }

    async fn exchange(
        &self,
        method: Method,
        url: Url,
        headers: HeaderMap,
        body: &str,
    ) -> Result<Response, TransportError> {
        let body = bytes::Bytes::copy_from_slice(body.as_bytes());
        self.transport.send(Request { method, url, headers, body, purpose: Purpose::Api }).await
    }

    async fn call(&self, method: Method, path: &str, body: &str) -> (u16, Value) {
        let response = self.send(method, path, body).await.unwrap();
        let status = response.status.as_u16();
        let body = read_body(response.body, 1 << 20).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap())
    }

    async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call(Method::GET, path, "").await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// Exports, and gives the address and the MD5.
    async fn export(&self, snapshot: SnapshotId) -> (Url, String) {
        let (status, operation) = self.call(Method::POST, &format!("/snapshot/{snapshot}:export"), "").await;
        assert_eq!((status, &operation["state"]), (200, &json!("success")), "{operation}");
        let export = self.get(&format!("/snapshot/{snapshot}")).await["export"].clone();
        let address = Url::parse(export["presigned-url"].as_str().unwrap()).unwrap();
        (address, export["md5sum"].as_str().unwrap().to_owned())
    }

    async fn fetch(&self, address: &Url, headers: &[(HeaderName, &str)]) -> Response {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::try_from(*value).unwrap()))
            .collect();
        self.exchange(Method::GET, address.clone(), headers, "").await.unwrap()
    }
}

async fn bytes(response: Response) -> Vec<u8> {
    read_body(response.body, 1 << 26).await.unwrap().to_vec()
}

fn header(response: &Response, name: HeaderName) -> Option<String> {
    Some(response.headers.get(name)?.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_snapshot_is_listed_exported_promoted_and_deleted() {
    on_both(async |stage| {
        let Stage { world, client, zone, instance, snapshot, .. } = stage;
        let listed = client.get("/snapshot").await;
        let expected = json!({"snapshots": [{
            "id": snapshot,
            "name": "web-1_ROOT-100001_20261122023000",
            "created-at": "2026-11-22T02:30:00Z",
            "state": "exported",
            "size": 10,
            "instance": {"id": instance},
            "application-consistent": false,
        }]});
        assert_eq!(listed, expected);
        let listed = client.get("/instance").await;
        assert_eq!(listed["instances"][0]["labels"], json!({"backup": "nightly"}));
        let got = client.get(&format!("/instance/{instance}")).await;
        assert_eq!(got["snapshots"], json!([{"id": snapshot}]));

        let (address, md5) = client.export(*snapshot).await;
        let response = client.fetch(&address, &[]).await;
        let image = world.image(*snapshot);
        assert_eq!(header(&response, CONTENT_LENGTH), Some(image.file_bytes().to_string()));
        assert_eq!(bytes(response).await, image.read(0..image.file_bytes()));
        assert_eq!(md5, image.md5());

        let (status, operation) =
            client.call(Method::POST, &format!("/snapshot/{snapshot}:promote"), r#"{"name":"gold"}"#).await;
        assert_eq!((status, &operation["state"]), (200, &json!("success")));
        let template =
            client.get(&format!("/template/{}", operation["reference"]["id"].as_str().unwrap())).await;
        for (field, value) in [
            ("name", json!("gold")),
            ("visibility", json!("private")),
            ("boot-mode", json!("uefi")),
            ("description", json!(format!("Promoted snapshot - {snapshot}"))),
            ("size", json!(10_u64 << 30)),
        ] {
            assert_eq!(template[field], value, "{field}");
        }
        assert_eq!(client.get("/template?visibility=private").await["templates"], json!([template]));
        let public = client.get("/template").await["templates"].clone();
        assert!(public.as_array().unwrap().iter().all(|one| one["visibility"] == "public"), "{public}");

        let (status, operation) = client.call(Method::DELETE, &format!("/snapshot/{snapshot}"), "").await;
        assert_eq!((status, &operation["state"]), (200, &json!("success")));
        assert_eq!(client.get("/snapshot").await, json!({"snapshots": []}));
        assert!(world.snapshots(zone).is_empty());
        let (status, body) = client.call(Method::DELETE, &format!("/snapshot/{snapshot}"), "").await;
        assert_eq!((status, body), (404, json!({"message": "not found"})));
        assert_eq!(client.fetch(&address, &[]).await.status, StatusCode::NOT_FOUND);
    })
    .await;
}

#[tokio::test]
async fn zones_answer_the_unsigned_and_point_back_at_where_they_were_asked() {
    on_both(async |stage| {
        let client = &stage.client;
        let address = Url::parse(&client.endpoint.replace("{zone}", "ch-gva-2")).unwrap();
        let zones = address.clone().join("v2/zone").unwrap();
        let response = client.exchange(Method::GET, zones, HeaderMap::new(), "").await.unwrap();
        assert_eq!(response.status, 200);
        assert_eq!(header(&response, CONTENT_TYPE).unwrap(), "application/json");
        let zones: Value = serde_json::from_slice(&bytes(response).await).unwrap();
        let endpoints: Vec<&str> = zones["zones"]
            .as_array()
            .unwrap()
            .iter()
            .map(|zone| zone["api-endpoint"].as_str().unwrap())
            .collect();
        let expected = ["ch-gva-2", "de-fra-1"].map(|zone| client.endpoint.replace("{zone}", zone));
        assert_eq!(endpoints, expected);
    })
    .await;
}

#[tokio::test]
async fn a_bad_signature_and_a_missing_permission_are_both_403() {
    on_both(async |stage| {
        let refused = async |client: &Client, path: &str| {
            let (status, body) = client.call(Method::GET, path, "").await;
            assert_eq!(status, 403, "{body}");
            body["message"].as_str().unwrap().to_owned()
        };
        let with = |key, secret, clock: &SimClock| Client {
            transport: stage.client.transport.clone(),
            endpoint: stage.client.endpoint.clone(),
            zone: stage.zone.clone(),
            key,
            secret,
            clock: clock.clone(),
        };
        stage.world.add_key("EXOlister", "listing", &[Call::ListSnapshots]);
        let bad = "Invalid request signature";
        assert_eq!(refused(&with(API_KEY, "wrong", &stage.clock), "/snapshot").await, bad);
        assert_eq!(refused(&with("EXOunknown", API_SECRET, &stage.clock), "/snapshot").await, bad);
        let late = SimClock::starting_at(stage.clock.now() - SignedDuration::from_mins(11));
        assert_eq!(refused(&with(API_KEY, API_SECRET, &late), "/snapshot").await, bad);

        let lister = with("EXOlister", "listing", &stage.clock);
        lister.get("/snapshot").await;
        let missing = "Forbidden by role policy for compute";
        for path in ["/instance", "/zone", "/quota", "/template?visibility=private"] {
            assert_eq!(refused(&lister, path).await, missing, "{path}");
        }
        let (status, _) =
            lister.call(Method::GET, "/operation/00000000-0000-4000-8000-000000000000", "").await;
        assert_eq!(status, 404, "operations need no permission");
    })
    .await;
}

#[tokio::test]
async fn what_another_zone_has_is_not_found() {
    on_both(async |stage| {
        let other = Client {
            transport: stage.client.transport.clone(),
            endpoint: stage.client.endpoint.clone(),
            zone: stage.other.clone(),
            clock: stage.clock.clone(),
            ..stage.client
        };
        let operation =
            stage.client.call(Method::POST, &format!("/snapshot/{}:export", stage.snapshot), "").await.1;
        for path in [
            format!("/snapshot/{}", stage.snapshot),
            format!("/instance/{}", stage.instance),
            format!("/operation/{}", operation["id"].as_str().unwrap()),
        ] {
            stage.client.get(&path).await;
            assert_eq!(other.call(Method::GET, &path, "").await.0, 404, "{path}");
        }
        assert_eq!(other.get("/snapshot").await, json!({"snapshots": []}));
    })
    .await;
}

#[tokio::test]
async fn a_new_snapshot_is_named_by_the_platform_and_counts_against_the_quota() {
    on_both(async |stage| {
        let Stage { world, client, instance, zone, .. } = stage;
        world.set_quota("snapshot", 2);
        let create = format!("/instance/{instance}:create-snapshot");
        let (status, operation) = client.call(Method::POST, &create, "").await;
        assert_eq!(status, 200);
        let made = client.get(&format!("/snapshot/{}", operation["reference"]["id"].as_str().unwrap())).await;
        assert_eq!(made["state"], "exported");
        assert!(made["name"].as_str().unwrap().starts_with("web-1_ROOT-100001_202611231000"), "{made}");
        assert_eq!(
            client.get("/quota/snapshot").await,
            json!({"resource": "snapshot", "usage": 2, "limit": 2})
        );
        assert_eq!(client.call(Method::POST, &create, "").await.0, 409);
        assert_eq!(client.call(Method::GET, "/quota/sandwich", "").await.0, 404);
        assert_eq!(world.snapshots(zone).len(), 2);
        world.remove_instance(*instance);
        assert!(world.snapshots(zone).is_empty(), "snapshots die with their instance");
    })
    .await;
}

#[tokio::test]
async fn a_template_is_registered_from_an_address_with_its_md5() {
    on_both(async |stage| {
        let Stage { world, client, zone, .. } = stage;
        let register = async |checksum: &str| {
            let body = json!({"name": "back", "url": "https://example.org/back.qcow2", "checksum": checksum,
                "ssh-key-enabled": true, "password-enabled": false, "boot-mode": "uefi"});
            client.call(Method::POST, "/template", &body.to_string()).await
        };
        let md5 = "d41d8cd98f00b204e9800998ecf8427e";
        assert_eq!(register("not an MD5").await.0, 400);
        assert_eq!(register(md5).await.0, 200);
        let template = world.templates(zone).remove(0);
        assert_eq!(template.checksum.as_deref(), Some(md5));
        assert_eq!(template.url.as_deref(), Some("https://example.org/back.qcow2"));
        let (status, _) = client.call(Method::DELETE, &format!("/template/{}", template.id), "").await;
        assert_eq!((status, world.templates(zone)), (200, vec![]));
    })
    .await;
}

#[tokio::test]
async fn the_store_serves_ranges_and_only_for_the_image_that_is_meant() {
    on_both(async |stage| {
        let client = &stage.client;
        let (address, md5) = client.export(stage.snapshot).await;
        let image = stage.world.image(stage.snapshot);
        let length = image.file_bytes();
        let tag = image.etag();
        assert!(!tag.contains(&md5), "a multipart upload's tag is no MD5");

        let response = client.fetch(&address, &[(RANGE, "bytes=100-4200"), (IF_RANGE, &tag)]).await;
        assert_eq!(response.status, StatusCode::PARTIAL_CONTENT);
        assert_eq!(header(&response, CONTENT_RANGE), Some(format!("bytes 100-4200/{length}")));
        assert_eq!(header(&response, CONTENT_LENGTH).as_deref(), Some("4101"));
        assert_eq!(header(&response, ETAG).as_ref(), Some(&tag));
        assert_eq!(bytes(response).await, image.read(100..4201));

        let response = client.fetch(&address, &[(RANGE, "bytes=8192-"), (IF_RANGE, "\"other\"")]).await;
        assert_eq!(response.status, StatusCode::OK, "another image: all of it");
        assert_eq!(bytes(response).await.len() as u64, length);

        let response = client.fetch(&address, &[(RANGE, &format!("bytes={length}-"))]).await;
        assert_eq!(response.status, StatusCode::RANGE_NOT_SATISFIABLE);
        assert_eq!(header(&response, CONTENT_RANGE), Some(format!("bytes */{length}")));

        stage.world.set_image(stage.snapshot, Image::new(SMALL, 99));
        let response = client.fetch(&address, &[(RANGE, "bytes=10-"), (IF_RANGE, &tag)]).await;
        assert_eq!(response.status, StatusCode::OK);
    })
    .await;
}

#[tokio::test]
async fn a_presigned_address_expires_and_takes_no_second_authorization() {
    on_both(async |stage| {
        let client = &stage.client;
        stage.world.set_address_lifetime(Duration::from_mins(10));
        let (address, _) = client.export(stage.snapshot).await;
        if stage.in_process {
            assert_eq!(
                address.host_str(),
                Some("exported-snapshots-ch-gva-2-prod.sos-ch-gva-2.exo.io"),
                "{address}"
            );
        }
        let query: Vec<String> = address.query_pairs().map(|(name, _)| name.into_owned()).collect();
        for name in ["X-Amz-Date", "X-Amz-Expires", "X-Amz-Signature"] {
            assert!(query.iter().any(|there| there == name), "{name}");
        }
        let status = async |method: Method, address: &Url, headers| {
            client.exchange(method, address.clone(), headers, "").await.unwrap().status.as_u16()
        };
        let none = HeaderMap::new;
        assert_eq!(status(Method::GET, &address, none()).await, 200);
        assert_eq!(status(Method::HEAD, &address, none()).await, 403);
        let authorized = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static("Bearer x"))]);
        assert_eq!(status(Method::GET, &address, authorized).await, 400);
        let tampered = Url::parse(&address.as_str().replace("Expires=600", "Expires=6000")).unwrap();
        assert_ne!(tampered, address);
        assert_eq!(status(Method::GET, &tampered, none()).await, 403);

        stage.clock.step(SignedDuration::from_mins(11));
        assert_eq!(status(Method::GET, &address, none()).await, 403);
        let (fresh, _) = client.export(stage.snapshot).await;
        assert_ne!(fresh, address);
        assert_eq!(status(Method::GET, &fresh, none()).await, 200);
    })
    .await;
}

#[tokio::test]
async fn faults_of_an_answer_reach_the_client() {
    on_both(async |stage| {
        let client = &stage.client;
        let get = format!("/snapshot/{}", stage.snapshot);
        let struck = async |effect: Effect| {
            stage.world.clear_faults();
            stage.world.fault(Fault::on(Call::GetSnapshot, effect).in_zone(&stage.zone).of(stage.snapshot.0));
            client.send(Method::GET, &get, "").await
        };
        let body = async |effect| String::from_utf8(bytes(struck(effect).await.unwrap()).await).unwrap();

        let cut = struck(Effect::CutBefore).await.unwrap_err();
        assert_eq!(cut.reached, Reached::Unknown);
        let unreachable = struck(Effect::Unreachable).await.unwrap_err();
        assert!(!stage.in_process || unreachable.reached == Reached::Nothing);

        let response = struck(Effect::status(503, "later")).await.unwrap();
        assert_eq!(response.status, 503);
        assert_eq!(bytes(response).await, br#"{"message":"later"}"#);
        let response = struck(Effect::html()).await.unwrap();
        assert_eq!(
            (response.status.as_u16(), header(&response, CONTENT_TYPE).as_deref()),
            (200, Some("text/html"))
        );
        assert!(serde_json::from_str::<Value>(&body(Effect::malformed_json()).await).is_err());
        let padded = body(Effect::Pad(100_000)).await;
        assert!(padded.len() > 100_000 && serde_json::from_str::<Value>(&padded).is_ok());

        let response = struck(Effect::header(RETRY_AFTER, "7")).await.unwrap();
        assert_eq!(header(&response, RETRY_AFTER).as_deref(), Some("7"));
        let response = struck(Effect::DateSkew(SignedDuration::from_mins(20))).await.unwrap();
        assert!(header(&response, DATE).unwrap().starts_with("Mon, 23 Nov 2026 10:20:"));
        if stage.in_process {
            let response = struck(Effect::Header(DATE, None)).await.unwrap();
            assert_eq!(header(&response, DATE), None);
        }
        let odd: Value =
            serde_json::from_str(&body(Effect::Edit("/state", Some(json!("hibernating")))).await).unwrap();
        assert_eq!(odd["state"], "hibernating");
        let bare: Value = serde_json::from_str(&body(Effect::Edit("/instance/id", None)).await).unwrap();
        assert_eq!(bare["instance"], json!({}));

        for effect in [Effect::CutBody(10), Effect::header(CONTENT_LENGTH, "100000")] {
            let response = struck(effect.clone()).await.unwrap();
            assert!(read_body(response.body, 1 << 20).await.is_err(), "{effect:?}");
        }
        assert_eq!(body(Effect::header(CONTENT_LENGTH, "5")).await.len(), 5);
    })
    .await;
}

#[tokio::test]
async fn faults_of_the_store_reach_the_client() {
    on_both(async |stage| {
        let client = &stage.client;
        let image = stage.world.image(stage.snapshot);
        let whole = image.read(0..image.file_bytes());
        let struck = async |effect: Effect, range: &str| {
            stage.world.clear_faults();
            let (address, _) = client.export(stage.snapshot).await;
            stage.world.fault(Fault::on(Call::GetImage, effect).of(stage.snapshot.0));
            (client.fetch(&address, &[(RANGE, range), (IF_RANGE, &image.etag())]).await, address)
        };
        let (response, _) = struck(Effect::IgnoreRange, "bytes=5-").await;
        assert_eq!(response.status, 200);
        assert_eq!(bytes(response).await, whole);
        let (response, _) = struck(Effect::Etag("\"new\""), "bytes=5-").await;
        assert_eq!((response.status.as_u16(), header(&response, ETAG).as_deref()), (200, Some("\"new\"")));

        let (response, _) = struck(Effect::Corrupt(5000), "bytes=4990-5010").await;
        let mut expected = image.read(4990..5011);
        expected[10] = !expected[10];
        assert_eq!(bytes(response).await, expected);

        let (response, address) = struck(Effect::Expire(7), "bytes=0-").await;
        assert_eq!(response.status, 206);
        assert!(read_body(response.body, 1 << 26).await.is_err());
        stage.world.clear_faults();
        assert_eq!(client.fetch(&address, &[]).await.status, 403);
        let (response, _) = struck(Effect::Expire(0), "bytes=0-").await;
        assert_eq!(response.status, 403);
        assert!(String::from_utf8(bytes(response).await).unwrap().contains("Request has expired"));
    })
    .await;
}

#[tokio::test]
async fn an_answer_lost_after_its_effect_leaves_the_effect() {
    on_both(async |stage| {
        let delete = format!("/snapshot/{}", stage.snapshot);
        stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::CutBefore).times(1));
        stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::CutAfter).after(1).times(1));
        for left in [1, 0] {
            let lost = stage.client.send(Method::DELETE, &delete, "").await.unwrap_err();
            assert_eq!(lost.reached, Reached::Unknown);
            assert_eq!(stage.world.snapshots(&stage.zone).len(), left);
        }
        assert_eq!(stage.client.call(Method::DELETE, &delete, "").await.0, 404);
    })
    .await;
}

#[tokio::test]
async fn the_log_tells_every_request_without_secrets() {
    on_both(async |stage| {
        let client = &stage.client;
        client.get("/template?visibility=private").await;
        assert!(stage.world.changes().is_empty());
        let (address, _) = client.export(stage.snapshot).await;
        let whole = bytes(client.fetch(&address, &[]).await).await.len();
        stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::CutAfter));
        let _ = client.send(Method::DELETE, &format!("/snapshot/{}", stage.snapshot), "").await;
        let log = stage.world.log();
        let told: Vec<_> =
            log.iter().map(|one| (one.call.as_str(), one.status().map(|status| status.as_u16()))).collect();
        let expected = [
            ("list-templates", Some(200)),
            ("export-snapshot", Some(200)),
            ("get-snapshot", Some(200)),
            ("get-image", Some(200)),
            ("delete-snapshot", None),
        ];
        assert_eq!(told, expected);
        assert_eq!(log[3].body_bytes(), whole as u64);
        assert!(log.iter().all(|one| !one.path.contains("X-Amz") && !one.path.contains('?')));
        let changes: Vec<_> = stage.world.changes().iter().map(|one| one.call).collect();
        assert_eq!(changes, [Call::ExportSnapshot, Call::DeleteSnapshot]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn operations_take_their_time() {
    let stage = arranged();
    let client = &stage.client;
    let (_, operation) = client.call(Method::DELETE, &format!("/snapshot/{}", stage.snapshot), "").await;
    let poll = format!("/operation/{}", operation["id"].as_str().unwrap());
    assert_eq!(operation["state"], "pending");
    assert_eq!(operation["reference"]["id"], json!(stage.snapshot));
    stage.clock.sleep(Duration::from_millis(1999)).await;
    assert_eq!(client.get(&poll).await["state"], "pending");
    assert_eq!(client.get("/snapshot").await["snapshots"][0]["state"], "deleting");
    stage.clock.sleep(Duration::from_millis(1)).await;
    assert_eq!(client.get(&poll).await["state"], "success");
    assert_eq!(client.get("/snapshot").await, json!({"snapshots": []}));

    let (_, operation) =
        client.call(Method::POST, &format!("/instance/{}:create-snapshot", stage.instance), "").await;
    let id = operation["reference"]["id"].as_str().unwrap();
    assert_eq!(client.get(&format!("/snapshot/{id}")).await["state"], "snapshotting");
    let (status, body) = client.call(Method::DELETE, &format!("/snapshot/{id}"), "").await;
    assert_eq!(status, 409, "{body}");
    stage.clock.sleep(Duration::from_secs(2)).await;
    assert_eq!(client.get(&format!("/snapshot/{id}")).await["state"], "exported");
}

#[tokio::test(start_paused = true)]
async fn operations_end_as_a_fault_says_and_then_have_no_effect() {
    let ending = |state, when| {
        Effect::Operation(Ending { state, reason: Some("busy"), message: Some("try later"), when })
    };
    // The fault; the state in the first answer; after an hour.
    let table = [
        (Effect::operation_fails("busy", "try later"), "pending", "failure"),
        (Effect::fails_inline("busy", "try later"), "failure", "failure"),
        (Effect::operation_hangs(), "pending", "pending"),
        (ending("timeout", When::Usual), "pending", "timeout"),
        (ending("hibernating", When::AtOnce), "hibernating", "hibernating"),
    ];
    for (effect, first, last) in table {
        let stage = arranged();
        stage.world.fault(Fault::on(Call::DeleteSnapshot, effect));
        let (_, operation) =
            stage.client.call(Method::DELETE, &format!("/snapshot/{}", stage.snapshot), "").await;
        assert_eq!(operation["state"], first);
        stage.clock.sleep(Duration::from_hours(1)).await;
        let operation = stage.client.get(&format!("/operation/{}", operation["id"].as_str().unwrap())).await;
        assert_eq!(operation["state"], last);
        if last != "pending" {
            assert_eq!((&operation["reason"], &operation["message"]), (&json!("busy"), &json!("try later")));
            assert_eq!(stage.world.snapshots(&stage.zone)[0].state, SnapshotState::Exported);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn delays_and_stalls_last_and_a_late_answer_was_carried_out() {
    let stage = arranged();
    let client = &stage.client;
    stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::Delay(Duration::from_secs(40))));
    let path = format!("/snapshot/{}", stage.snapshot);
    let limit = Duration::from_secs(30);
    assert!(timeout(&stage.clock, limit, client.send(Method::DELETE, &path, "")).await.is_err());
    assert!(stage.world.snapshots(&stage.zone).is_empty());

    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::Stall(3)));
    let response = client.send(Method::GET, "/snapshot", "").await.unwrap();
    assert!(timeout(&stage.clock, limit, read_body(response.body, 1 << 20)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn the_first_polls_of_each_operation_can_miss_it() {
    let stage = arranged();
    let client = &stage.client;
    stage.world.fault(Fault::on(Call::GetOperation, Effect::status(404, "not found")).times(2).each());
    for _ in 0..2 {
        let (_, operation) =
            client.call(Method::POST, &format!("/snapshot/{}:export", stage.snapshot), "").await;
        let poll = format!("/operation/{}", operation["id"].as_str().unwrap());
        let mut statuses = Vec::new();
        for _ in 0..3 {
            statuses.push(client.call(Method::GET, &poll, "").await.0);
        }
        assert_eq!(statuses, [404, 404, 200]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_seed_makes_the_same_world_again() {
    let (one, two) = (arranged(), arranged());
    assert_eq!(one.world.snapshots(&one.zone), two.world.snapshots(&two.zone));
    assert_eq!(one.world.image(one.snapshot).md5(), two.world.image(two.snapshot).md5());
    let later = one.world.add_snapshot(one.instance, "2026-11-23T02:30:00Z".parse::<Timestamp>().unwrap());
    assert_ne!(one.world.image(later).md5(), one.world.image(one.snapshot).md5());
}

#[tokio::test(start_paused = true)]
async fn the_platforms_clock_may_be_another() {
    let stage = arranged();
    stage.world.set_skew(SignedDuration::from_mins(20));
    let response = stage.client.send(Method::GET, "/snapshot", "").await.unwrap();
    assert_eq!(response.status, 403, "signed for ten minutes from a clock that is twenty behind");
    assert_eq!(header(&response, DATE).as_deref(), Some("Mon, 23 Nov 2026 10:20:00 GMT"));
}

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_snapshots_are_listed() {
    let stage = arranged();
    let start: Timestamp = "2020-01-01T00:00:00Z".parse().unwrap();
    for number in 0..100_000 {
        stage.world.add_snapshot(stage.instance, start + SignedDuration::from_mins(number));
    }
    let response = stage.client.send(Method::GET, "/snapshot", "").await.unwrap();
    let listed: Value = serde_json::from_slice(&bytes(response).await).unwrap();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 100_001);
}
