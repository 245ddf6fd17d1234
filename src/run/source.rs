//! An exported image as the archive wants it: bytes from any offset, and a fresh address when one expires.
//!
//! The presigned address is a credential. It is read here, handed to the transport, and never shown.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use crate::archive::transfer::source::{ImageSource, ImageStream, SourceError};
use crate::clock::{self, Clock};
use crate::exoscale::client::ZoneClient;
use crate::run::context::Runner;
use crate::run::step::StepError;
use crate::snapshot::{OperationId, SnapshotId};
use crate::transport::{Purpose, Request, Response, Transport, is_loopback};

/// A store may send us on a few times, to another node of its own; more is a ring.
const REDIRECTS_MAX: usize = 5;

/// An image that the platform exported, by its presigned address.
#[derive(Debug)]
pub struct ExportedImage {
    client: ZoneClient,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    request_timeout: Duration,
    allow_plain_http: bool,
    snapshot_id: SnapshotId,
    current: Mutex<Exported>,
}

#[derive(Debug, Clone)]
struct Exported {
    address: SecretString,
    md5: Option<String>,
}

impl ExportedImage {
    /// Asks for an export and reads its address.
    ///
    /// # Errors
    /// [`StepError`] if the platform does not export it, or gives no address.
    pub async fn export(
        runner: &Runner,
        client: ZoneClient,
        snapshot_id: SnapshotId,
    ) -> Result<(Self, Option<OperationId>), StepError> {
        let operation = client.export_snapshot(snapshot_id).await?;
        let current = exported(&client, snapshot_id).await?;
        let image = Self {
            client,
            transport: runner.transport.clone(),
            clock: runner.clock.clone(),
            request_timeout: runner.request_timeout,
            allow_plain_http: runner.allow_plain_http,
            snapshot_id,
            current: Mutex::new(current),
        };
        Ok((image, operation.id))
    }

    fn current(&self) -> Exported {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks one address, and those that it sends us on to.
    async fn ask(&self, address: &SecretString, headers: HeaderMap) -> Result<Response, SourceError> {
        let mut url = Url::parse(address.expose_secret()).map_err(|_| refused("its address is not a URL"))?;
        for _ in 0..=REDIRECTS_MAX {
            self.allow(&url)?;
            let request = Request {
                method: Method::GET,
                url: url.clone(),
                headers: headers.clone(),
                body: bytes::Bytes::new(),
                purpose: Purpose::Image,
            };
            let response = clock::timeout(&*self.clock, self.request_timeout, self.transport.send(request))
                .await
                .map_err(|error| SourceError::Broken(Box::new(error)))?
                .map_err(|error| SourceError::Broken(Box::new(error)))?;
            if !response.status.is_redirection() || response.status == StatusCode::NOT_MODIFIED {
                return Ok(response);
            }
            let next = response
                .headers
                .get(header::LOCATION)
                .and_then(|location| location.to_str().ok())
                .and_then(|location| url.join(location).ok())
                .ok_or_else(|| refused("the store sends us on to nowhere"))?;
            if next.scheme() != "https" && next.host() != url.host() {
                return Err(refused("the store sends us on to another host without TLS"));
            }
            url = next;
        }
        Err(refused("the store sends us in a ring"))
    }

    /// Plain HTTP is for this machine alone, unless the operator allows more.
    fn allow(&self, url: &Url) -> Result<(), SourceError> {
        match url.scheme() {
            "https" => Ok(()),
            "http" if is_loopback(url) || self.allow_plain_http => Ok(()),
            _ => {
                Err(refused("its address is not https; `allow_plain_http` under `[exoscale]` would allow it"))
            }
        }
    }
}

fn refused(why: &str) -> SourceError {
    SourceError::Refused(why.into())
}

async fn exported(client: &ZoneClient, snapshot_id: SnapshotId) -> Result<Exported, StepError> {
    let details = client
        .get_snapshot(snapshot_id)
        .await?
        .ok_or_else(|| StepError::failed("the snapshot was deleted after its export"))?;
    let export = details
        .export
        .ok_or_else(|| StepError::failed("the API says that it is exported, and gives no address for it"))?;
    Ok(Exported { address: export.presigned_url, md5: export.md5sum })
}

impl ImageSource for ExportedImage {
    fn md5(&self) -> Option<String> {
        self.current().md5
    }

    fn is_export(&self) -> bool {
        true
    }

    fn open<'a>(
        &'a self,
        offset: u64,
        until: Option<u64>,
        _etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>> {
        Box::pin(async move {
            let mut headers = HeaderMap::new();
            if offset > 0 || until.is_some() {
                let last = until.map_or_else(String::new, |until| until.saturating_sub(1).to_string());
                let range = HeaderValue::from_str(&format!("bytes={offset}-{last}"));
                // Without `If-Range`: the same bytes have another ETag after a new export, and the MD5 judges in the end.
                headers.insert(header::RANGE, range.map_err(|_| refused("the range can't be asked for"))?);
            }
            let response = self.ask(&self.current().address, headers).await?;
            accept(&response)?;
            ImageStream::from_response(response.status, &response.headers, response.body)
        })
    }

    fn renew(&self) -> BoxFuture<'_, Result<(), SourceError>> {
        Box::pin(async move {
            let renewed = async {
                self.client.export_snapshot(self.snapshot_id).await?;
                exported(&self.client, self.snapshot_id).await
            };
            let renewed = renewed
                .await
                .map_err(|step_error: StepError| SourceError::Refused(step_error.message.into()))?;
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = renewed;
            Ok(())
        })
    }
}

/// Whether an answer is the image, or what its status means for the next try.
fn accept(response: &Response) -> Result<(), SourceError> {
    match response.status {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => {
            // A page instead of an image, as proxies send it with a good conscience.
            let kind = response.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
            if kind.is_some_and(|kind| kind.starts_with("text/html")) {
                return Err(broken("the store answers with a web page"));
            }
            Ok(())
        }
        // What stores say of an address whose time is over: 403 (S3) or 400 (others).
        StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::GONE => {
            Err(SourceError::Expired)
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => Err(broken_by(response.status)),
        StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE => Err(SourceError::Changed),
        status if status.is_server_error() => Err(broken_by(status)),
        status => Err(refused(&format!("the store answers {status}"))),
    }
}

fn broken_by(status: StatusCode) -> SourceError {
    broken(&format!("the store answers {status}"))
}

fn broken(why: &str) -> SourceError {
    SourceError::Broken(why.into())
}
