//! Addresses: the real hosts in this process, one host and port behind a socket.

use std::fmt;

use crate::snapshot::ZoneName;

/// Where a request goes.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) zone: ZoneName,
    pub(super) side: Side,
    pub(super) kind: PlaceKind,
}

/// What of the zone a request is for.
#[derive(Debug)]
pub(super) enum PlaceKind {
    /// The path behind `/v2`; empty if it does not begin so.
    Api(String),
    /// The key of an object.
    Store(String),
}

/// Which addresses this client sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Side {
    /// The real hosts.
    Hosts,
    /// One host and port for everything.
    Socket(String),
}

impl Place {
    /// Nothing if no host of ours has this name.
    pub(super) fn of(url: &url::Url) -> Option<Self> {
        let host = url.host_str()?;
        let path = url.path();
        let behind_v2 = |path: &str| match path.strip_prefix("/v2") {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => rest.to_owned(),
            _ => String::new(),
        };
        if let Some(zone) = host.strip_prefix("api-").and_then(|rest| rest.strip_suffix(".exoscale.com")) {
            let kind = PlaceKind::Api(behind_v2(path));
            return Some(Self { zone: zone.parse().ok()?, side: Side::Hosts, kind });
        }
        if let Some(rest) = host.strip_suffix(".exo.io") {
            let (bucket, zone) = rest.split_once(".sos-")?;
            let kind = PlaceKind::Store(path.trim_start_matches('/').to_owned());
            return (bucket == bucket_of(zone)).then_some(Self {
                zone: zone.parse().ok()?,
                side: Side::Hosts,
                kind,
            });
        }
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        let side = Side::Socket(format!("{host}{port}"));
        let (first, rest) = path.trim_start_matches('/').split_once('/').unwrap_or((path, ""));
        let in_bucket = first.strip_prefix("exported-snapshots-").and_then(|rest| rest.strip_suffix("-prod"));
        let (zone, kind) = match in_bucket {
            Some(zone) => (zone, PlaceKind::Store(rest.to_owned())),
            None => (first, PlaceKind::Api(behind_v2(&format!("/{rest}")))),
        };
        Some(Self { zone: zone.parse().ok()?, side, kind })
    }
}

fn bucket_of(zone: impl fmt::Display) -> String {
    format!("exported-snapshots-{zone}-prod")
}

impl Side {
    /// A zone's API, with `/v2`.
    pub(super) fn api(&self, zone: &ZoneName) -> String {
        match self {
            Self::Hosts => format!("https://api-{zone}.exoscale.com/v2"),
            Self::Socket(authority) => format!("http://{authority}/{zone}/v2"),
        }
    }

    /// An object of a zone's export bucket.
    pub(super) fn object(&self, zone: &ZoneName, key: &str) -> String {
        let bucket = bucket_of(zone);
        match self {
            Self::Hosts => format!("https://{bucket}.sos-{zone}.exo.io/{key}"),
            Self::Socket(authority) => format!("http://{authority}/{bucket}/{key}"),
        }
    }
}
