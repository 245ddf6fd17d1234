//! Notifications to systemd: ready, reloading, stopping, alive, and a line of status.
//!
//! The protocol is `sd_notify(3)`: a datagram of `NAME=value` lines to the socket that `NOTIFY_SOCKET` names. Where
//! there is none, nothing is sent. A notification that can't be sent is logged: a service manager that does not listen is
//! no reason to stop.
//!
//! The crate `sd-notify` sends without a time-out, and reads the process' environment alone, which tests can't change.
//! The environment stays as it is: this program starts no other that could inherit it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tracing::warn;

use crate::text::excerpt;

/// Longer texts are cut: systemd shows the status in one line.
const STATUS_CHARACTERS_MAX: usize = 300;

/// The longest wait for the service manager to take a datagram. The caller waits, since without `READY=1` systemd ends
/// the service.
const SEND_WAIT_MAX: Duration = Duration::from_secs(1);

/// From the end of the grace to the end of the process: the last state is written, the port is closed.
const STOPPING_MARGIN: Duration = Duration::from_secs(15);

/// The service manager that started this process, if there is one.
#[derive(Debug)]
pub struct ServiceManager {
    socket: Option<UnixDatagram>,
    /// Whether it has a watchdog, which ends this process unless it is fed.
    is_watched: bool,
}

impl ServiceManager {
    /// The one that the process' environment names.
    pub fn from_environment() -> Self {
        Self::new(&|name| std::env::var_os(name), std::process::id())
    }

    /// The one that an environment names for the process `pid`.
    pub fn new(environment: &dyn Fn(&str) -> Option<OsString>, pid: u32) -> Self {
        let variable = |name: &str| environment(name).filter(|value| !value.is_empty());
        let socket = variable("NOTIFY_SOCKET").and_then(|name| {
            connected(&name)
                .map_err(|error| {
                    warn!("can't notify the service manager: `NOTIFY_SOCKET` is {name:?}: it can't be used: {error}");
                })
                .ok()
        });
        let number = |name: &str| variable(name).map(|value| value.to_str()?.parse::<u64>().ok());
        // Another process' watchdog is not ours to feed.
        let ours = number("WATCHDOG_PID").is_none_or(|named| named == Some(u64::from(pid)));
        let is_watched =
            number("WATCHDOG_USEC").flatten().is_some_and(|micros| micros > 0 && ours && socket.is_some());
        Self { socket, is_watched }
    }

    /// The daemon is set up, or set up anew after [`Self::reloading`].
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// What `systemctl status` shows.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", one_line(text)));
    }

    /// A new configuration is being loaded; [`Self::ready`] ends it, also where the old one stays.
    pub fn reloading(&self) {
        // The absolute time is what systemd compares, so no seam can stand between.
        let now = clock_gettime(ClockId::Monotonic);
        let micros = now.tv_sec.saturating_mul(1_000_000).saturating_add(now.tv_nsec / 1000);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// The end has begun, and steps in flight get up to `grace`. systemd waits at least as long, whatever the unit's
    /// `TimeoutStopSec` says.
    pub fn stopping(&self, grace: Duration) {
        let micros = grace.saturating_add(STOPPING_MARGIN).as_micros();
        self.send(&format!("STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC={micros}"));
    }

    /// Feeds the watchdog, if there is one.
    pub fn alive(&self) {
        if self.is_watched {
            self.send("WATCHDOG=1");
        }
    }

    fn send(&self, state: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(state.as_bytes()) {
            let first = state.lines().next().unwrap_or_default();
            warn!("can't notify the service manager of `{first}`: {error}");
        }
    }
}

/// A socket of ours that leads to the named one: a path, or an abstract name after `@`.
fn connected(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(name)?,
        // Such as `vsock:` addresses.
        _ => return Err(io::Error::other("it begins neither with `/` nor with `@`")),
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(SEND_WAIT_MAX))?;
    Ok(socket)
}

/// A line's end would begin another assignment.
fn one_line(text: &str) -> String {
    excerpt(text, STATUS_CHARACTERS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PID: u32 = 4711;

    /// A service manager's end, and the one that it gave to us.
    fn manager(folder: &tempfile::TempDir, variables: &[(&str, &str)]) -> (UnixDatagram, ServiceManager) {
        let path = folder.path().join("notify");
        let theirs = UnixDatagram::bind(&path).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut all = vec![("NOTIFY_SOCKET", path.to_str().unwrap())];
        all.extend(variables);
        (theirs, told_by(&all))
    }

    fn told_by(variables: &[(&str, &str)]) -> ServiceManager {
        let find = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        };
        ServiceManager::new(&find, PID)
    }

    /// What came since the last look.
    fn heard(theirs: &UnixDatagram) -> Vec<String> {
        let mut buffer = [0; 4096];
        std::iter::from_fn(|| {
            let count = theirs.recv(&mut buffer).ok()?;
            Some(String::from_utf8(buffer[..count].to_vec()).unwrap())
        })
        .collect()
    }

    #[test]
    fn each_word_is_one_datagram_of_the_protocol() {
        let folder = tempfile::tempdir().unwrap();
        let (theirs, manager) = manager(&folder, &[]);
        manager.ready("2 policies");
        manager.status("running nightly");
        manager.stopping(Duration::from_secs(30));
        assert_eq!(
            heard(&theirs),
            [
                "READY=1\nSTATUS=2 policies",
                "STATUS=running nightly",
                "STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC=45000000"
            ]
        );
    }

    #[test]
    fn a_reload_carries_the_monotonic_time_which_does_not_go_back() {
        let folder = tempfile::tempdir().unwrap();
        let (theirs, manager) = manager(&folder, &[]);
        manager.reloading();
        manager.reloading();
        let times: Vec<u64> = heard(&theirs)
            .iter()
            .map(|state| state.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().parse().unwrap())
            .collect();
        assert_eq!(times.len(), 2);
        assert!(0 < times[0] && times[0] <= times[1], "{times:?}");
    }

    #[test]
    fn a_status_can_neither_say_anything_else_nor_grow_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let (theirs, manager) = manager(&folder, &[]);
        manager.status("x\nSTOPPING=1\u{1b}");
        manager.ready(&"y".repeat(100_000));
        let heard = heard(&theirs);
        assert_eq!(heard[0], "STATUS=x\\u{a}STOPPING=1\\u{1b}");
        assert!(heard[1].len() < 1000, "{}", heard[1].len());
    }

    #[test]
    fn the_watchdog_is_fed_only_where_it_waits_for_this_process() {
        let cases = [
            (vec![("WATCHDOG_USEC", "60000000")], true),
            (vec![("WATCHDOG_USEC", "60000000"), ("WATCHDOG_PID", "4711")], true),
            (vec![("WATCHDOG_USEC", "60000000"), ("WATCHDOG_PID", "1")], false),
            (vec![("WATCHDOG_USEC", "0")], false),
            (vec![("WATCHDOG_USEC", "soon")], false),
            (vec![], false),
        ];
        for (variables, is_fed) in cases {
            let folder = tempfile::tempdir().unwrap();
            let (theirs, manager) = manager(&folder, &variables);
            manager.alive();
            let expected: &[&str] = if is_fed { &["WATCHDOG=1"] } else { &[] };
            assert_eq!(heard(&theirs), expected, "{variables:?}");
        }
    }

    #[test]
    fn an_abstract_socket_is_reached() {
        let name = format!("snapwarden-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let theirs = UnixDatagram::bind_addr(&address).unwrap();
        theirs.set_nonblocking(true).unwrap();
        told_by(&[("NOTIFY_SOCKET", &format!("@{name}"))]).status("there");
        assert_eq!(heard(&theirs), ["STATUS=there"]);
    }

    #[test]
    fn without_anybody_to_tell_nothing_is_said_and_nothing_fails() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        for socket in ["", "relative", "vsock:2:1", missing.to_str().unwrap()] {
            let manager = told_by(&[("NOTIFY_SOCKET", socket), ("WATCHDOG_USEC", "60000000")]);
            manager.ready("well");
            manager.alive();
            assert!(!manager.is_watched, "{socket}");
        }
        // One that is removed while we run.
        let (theirs, manager) = manager(&folder, &[]);
        drop(theirs);
        manager.ready("well");
    }
}
