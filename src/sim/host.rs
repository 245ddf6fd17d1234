//! Addresses: the real hosts in this process, one host and port behind a socket.

use std::fmt;

use crate::snapshot::ZoneName;

/// The target of a request.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) zone: ZoneName,
    pub(super) host: Host,
    pub(super) resource: Resource,
}

/// The part of a zone that a request is for.
#[derive(Debug)]
pub(super) enum Resource {
    /// The path behind `/v2`; empty if it does not begin so.
    Api(String),
    /// The key of an object.
    Object(String),
}

/// The hosts that this client talks to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Host {
    /// The names of the real hosts.
    Real,
    /// One host and port for everything.
    Socket(String),
}

impl Target {
    /// None if this world has no host of that name.
    pub(super) fn of(url: &url::Url) -> Option<Self> {
        let name = url.host_str()?;
        let path = url.path();
        let behind_v2 = |path: &str| match path.strip_prefix("/v2") {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => rest.to_owned(),
            _ => String::new(),
        };
        if let Some(zone) = name.strip_prefix("api-").and_then(|rest| rest.strip_suffix(".exoscale.com")) {
            let resource = Resource::Api(behind_v2(path));
            return Some(Self { zone: zone.parse().ok()?, host: Host::Real, resource });
        }
        if let Some(rest) = name.strip_suffix(".exo.io") {
            let (bucket, zone) = rest.split_once(".sos-")?;
            let resource = Resource::Object(path.trim_start_matches('/').to_owned());
            return (bucket == bucket_of(zone)).then_some(Self {
                zone: zone.parse().ok()?,
                host: Host::Real,
                resource,
            });
        }
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        let host = Host::Socket(format!("{name}{port}"));
        let (first, rest) = path.trim_start_matches('/').split_once('/').unwrap_or((path, ""));
        let in_bucket = first.strip_prefix("exported-snapshots-").and_then(|rest| rest.strip_suffix("-prod"));
        let (zone, resource) = match in_bucket {
            Some(zone) => (zone, Resource::Object(rest.to_owned())),
            None => (first, Resource::Api(behind_v2(&format!("/{rest}")))),
        };
        Some(Self { zone: zone.parse().ok()?, host, resource })
    }
}

fn bucket_of(zone: impl fmt::Display) -> String {
    format!("exported-snapshots-{zone}-prod")
}

impl Host {
    /// A zone's API, with `/v2`.
    pub(super) fn api(&self, zone: &ZoneName) -> String {
        match self {
            Self::Real => format!("https://api-{zone}.exoscale.com/v2"),
            Self::Socket(authority) => format!("http://{authority}/{zone}/v2"),
        }
    }

    /// An object of a zone's export bucket.
    pub(super) fn object(&self, zone: &ZoneName, key: &str) -> String {
        let bucket = bucket_of(zone);
        match self {
            Self::Real => format!("https://{bucket}.sos-{zone}.exo.io/{key}"),
            Self::Socket(authority) => format!("http://{authority}/{bucket}/{key}"),
        }
    }
}
