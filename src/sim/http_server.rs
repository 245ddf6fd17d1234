//! The world behind a socket: the same exchanges, over HTTP/1.1 on one port.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use http::header::HOST;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use url::Url;

use crate::sim::world::World;
use crate::transport::{Purpose, Request};

/// No request of the API has a longer body: the longest, promote, has a description of 4 KiB.
const BODY_BYTES_MAX: usize = 1 << 20;

/// A world that is being served. Dropping it closes the port; answers under way are finished.
#[derive(Debug)]
pub struct Served {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Served {
    /// The address at which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The endpoint with its placeholder for the zone's name, as it is written in a configuration.
    pub fn endpoint(&self) -> String {
        format!("http://{}/{{zone}}/v2", self.address)
    }
}

impl World {
    /// This world behind a socket, until the value is dropped; port 0 for a free one.
    ///
    /// # Errors
    /// If the address can't be listened at.
    pub async fn serve(&self, address: SocketAddr) -> std::io::Result<Served> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let service = Router::new().fallback(exchange).with_state(self.clone());
        let served = axum::serve(listener, service).with_graceful_shutdown(async {
            // Its value is never sent: it is dropped.
            let _ = stopped.await;
        });
        tokio::spawn(served.into_future());
        Ok(Served { address, _stop: stop })
    }
}

async fn exchange(State(world): State<World>, request: axum::extract::Request) -> axum::response::Response {
    let (head, body) = request.into_parts();
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    let path = head.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let Ok(url) = Url::parse(&format!("http://{host}{path}")) else { cut() };
    let Ok(body) = axum::body::to_bytes(body, BODY_BYTES_MAX).await else { cut() };
    let request = Request { method: head.method, url, headers: head.headers, body, purpose: Purpose::Api };
    let Ok(answer) = world.exchange(request).await else { cut() };
    let mut response = axum::response::Response::new(axum::body::Body::from_stream(answer.body));
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    response
}

/// Closes the connection without an answer.
///
/// A service of axum must answer; unwinding ends the task that serves this connection, and that alone. It calls
/// no panic hook, so nothing is printed.
fn cut() -> ! {
    std::panic::resume_unwind(Box::new("the connection is cut"))
}
