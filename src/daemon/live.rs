//! A socket in the state directory by which commands ask the daemon, whatever its port asks for.
//!
//! `status` needs no certificate and no password here, since only who may write to the directory can open the socket.
//! `status --live`, for the health of a container, asks `/livez`, which says nothing of backups: a stale backup must not end a
//! daemon that is downloading.

use std::io;
use std::path::Path;
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, to_bytes};
use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Request, StatusCode, Uri};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};

use crate::clock::{Clock, timeout};
use crate::disk::{Disk, RealDisk, blocking};
use crate::text::{chain, printable};

const FILE: &str = "daemon.sock";

/// The daemon answers from memory.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Enough for the status of some thousand policies with ten zones each.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// No process has the socket, or this user may not open it.
    #[error("no daemon answers at {0}")]
    Connect(String, #[source] io::Error),
    /// The daemon took the connection, and did not answer as it should.
    #[error("the daemon at {0} does not answer: {1}")]
    Silent(String, String),
}

/// Makes the socket, in place of what an earlier daemon left. Only the daemon that has the directory's lock may call it.
///
/// # Errors
/// None can be made, as below a path of more than 107 bytes.
pub async fn bind(state: &Path) -> io::Result<UnixListener> {
    remove(state).await?;
    UnixListener::bind(state.join(FILE))
}

/// Removes the socket, if there is one.
///
/// # Errors
/// It can't be removed.
pub async fn remove(state: &Path) -> io::Result<()> {
    let place = state.join(FILE);
    match blocking(move || RealDisk.remove_file(&place)).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Asks the daemon on this state directory for a path of its port, such as `/livez`.
///
/// # Errors
/// [`SocketError`].
pub async fn ask(
    state: &Path,
    path: &'static str,
    clock: &dyn Clock,
) -> Result<(StatusCode, Bytes), SocketError> {
    let place = state.join(FILE);
    let socket = printable(&place.to_string_lossy()).into_owned();
    let stream = match UnixStream::connect(&place).await {
        Ok(stream) => stream,
        Err(error) => return Err(SocketError::Connect(socket, error)),
    };
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = Uri::from_static(path);
    request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
    let asked = async {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let answered = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = to_bytes(Body::new(response.into_body()), ANSWER_BYTES_MAX).await?;
            Ok::<_, BoxError>((status, body))
        };
        let (answered, _) = tokio::join!(answered, connection);
        answered
    };
    match timeout(clock, TIMEOUT, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(SocketError::Silent(socket, chain(&*error))),
        Err(late) => Err(SocketError::Silent(socket, late.to_string())),
    }
}

/// Whether the loop of the daemon on this state directory turns.
///
/// # Errors
/// Why it does not, or why that can't be known.
pub async fn is_alive(state: &Path, clock: &dyn Clock) -> Result<(), String> {
    match ask(state, "/livez", clock).await {
        Ok((StatusCode::OK, _)) => Ok(()),
        Ok((_, why)) => Err(String::from_utf8_lossy(&why).trim_end().to_owned()),
        Err(error) => Err(chain(&error)),
    }
}
