//! A socket in the state directory by which `status --live` asks whether the scheduler's loop turns.
//!
//! It is for the health of a container: it needs no port, certificate or password, and says nothing of backups, since a
//! stale backup must not end a daemon that is downloading.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, timeout};
use crate::telemetry::Telemetry;

const FILE: &str = "daemon.sock";

/// What a loop that turns is answered with; else the answer is why it does not.
const OK: &str = "ok";

/// The daemon answers from memory.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An answer is one line.
const ANSWER_BYTES_MAX: u64 = 4 << 10;

/// After a connection that could not be taken, mostly since too many files are open.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    match tokio::fs::remove_file(state.join(FILE)).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Answers until `stop`.
pub async fn serve(
    listener: UnixListener,
    telemetry: Telemetry,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) {
    let answer = async {
        loop {
            match listener.accept().await {
                Ok((mut stream, _)) => {
                    let text = telemetry.alive().map_or_else(|why| why, |()| OK.to_owned());
                    // So few bytes fit the socket's buffer: a client that does not read keeps no other waiting.
                    let _ = timeout(&*clock, TIMEOUT, stream.write_all(text.as_bytes())).await;
                }
                Err(_) => clock.sleep(ACCEPT_PAUSE).await,
            }
        }
    };
    tokio::select! {
        () = answer => {}
        () = stop.cancelled() => {}
    }
}

/// Whether the loop of the daemon on this state directory turns.
///
/// # Errors
/// Why it does not, or why that can't be known.
pub async fn ask(state: &Path, clock: &dyn Clock) -> Result<(), String> {
    let socket = state.join(FILE);
    let asked = async {
        let stream = UnixStream::connect(&socket).await?;
        let mut text = String::new();
        stream.take(ANSWER_BYTES_MAX).read_to_string(&mut text).await?;
        Ok::<_, io::Error>(text)
    };
    match timeout(clock, TIMEOUT, asked).await {
        Ok(Ok(text)) if text == OK => Ok(()),
        Ok(Ok(why)) => Err(why),
        Ok(Err(error)) => Err(format!("no daemon answers at {}: {error}", socket.display())),
        Err(_) => {
            Err(format!("the daemon at {} does not answer within {} s", socket.display(), TIMEOUT.as_secs()))
        }
    }
}
