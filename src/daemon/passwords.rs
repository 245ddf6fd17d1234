//! Checks passwords by bcrypt, beside the threads of the network and one at a time, and remembers the results.
//!
//! bcrypt takes a tenth of a second by design. Prometheus asks with the same password again and again, and whoever guesses
//! must not keep others waiting.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::HeaderValue;
use sha2::Sha256;
use tokio::sync::Semaphore;

use crate::config::web::PasswordHash;
use crate::disk::begin_blocking;
use crate::randomness::Randomness;

/// Results that are remembered of each kind: more users are better kept by a proxy.
const REMEMBERED_MAX: usize = 64;

/// Passwords that wait to be checked. With some tenths of a second each, the last waits for some seconds.
const WAITING_MAX: usize = 16;

/// What became of a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Right,
    Wrong,
    /// Too many others wait.
    Busy,
}

/// Remembers what was right and what was wrong, by a keyed hash: no password is kept.
pub(super) struct Passwords {
    key: [u8; 32],
    known: Mutex<Known>,
    turn: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

/// Apart, so that guesses do not displace the right ones.
#[derive(Default)]
struct Known {
    right: VecDeque<[u8; 32]>,
    wrong: VecDeque<[u8; 32]>,
}

impl Passwords {
    pub(super) fn new(randomness: &dyn Randomness) -> Self {
        let mut key = [0; 32];
        for part in key.chunks_exact_mut(8) {
            part.copy_from_slice(&randomness.next_u64().to_le_bytes());
        }
        let (turn, places) = (Arc::new(Semaphore::new(1)), Arc::new(Semaphore::new(WAITING_MAX)));
        Self { key, known: Mutex::default(), turn, places }
    }

    /// Checks the value of an `Authorization` header. An unknown user costs as much as one with a wrong password.
    pub(super) async fn check(
        &self,
        users: &BTreeMap<String, PasswordHash>,
        header: &HeaderValue,
    ) -> Verdict {
        let Some((user, password)) = user_and_password(header) else { return Verdict::Wrong };
        // Without users none is asked for.
        let Some((known, hash)) = users.get_key_value(&user).or_else(|| users.first_key_value()) else {
            return Verdict::Wrong;
        };
        let (is_known, hash) = (*known == user, hash.clone());
        let tag = self.tag(&[user.as_bytes(), hash.as_str().as_bytes(), &password]);
        if let Some(verdict) = self.remembered(&tag) {
            return verdict;
        }
        let Ok(_place) = self.places.try_acquire() else { return Verdict::Busy };
        let Ok(turn) = Arc::clone(&self.turn).acquire_owned().await else { return Verdict::Busy };
        // Another connection may have asked meanwhile.
        if let Some(verdict) = self.remembered(&tag) {
            return verdict;
        }
        let fits = begin_blocking(move || {
            // It lasts as long as the work, also where the client has closed its connection.
            let _turn = turn;
            hash.fits(&password)
        });
        let Ok(fits) = fits.await else { return Verdict::Wrong };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (list, verdict) = if fits && is_known {
            (&mut known.right, Verdict::Right)
        } else {
            (&mut known.wrong, Verdict::Wrong)
        };
        if list.len() == REMEMBERED_MAX {
            list.pop_front();
        }
        list.push_back(tag);
        verdict
    }

    fn remembered(&self, tag: &[u8; 32]) -> Option<Verdict> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_in =
            |list: &VecDeque<[u8; 32]>| list.iter().fold(false, |found, one| found | are_equal(one, tag));
        match (is_in(&known.right), is_in(&known.wrong)) {
            (true, _) => Some(Verdict::Right),
            (false, true) => Some(Verdict::Wrong),
            (false, false) => None,
        }
    }

    /// A keyed hash of parts, each with its length before it.
    fn tag(&self, parts: &[&[u8]]) -> [u8; 32] {
        let Ok(mut hash) = Hmac::<Sha256>::new_from_slice(&self.key) else { return [0; 32] };
        for part in parts {
            hash.update(&part.len().to_le_bytes());
            hash.update(part);
        }
        hash.finalize().into_bytes().into()
    }
}

/// In a time that does not depend on where they differ.
fn are_equal(one: &[u8; 32], other: &[u8; 32]) -> bool {
    let differ = one.iter().zip(other).fold(0, |differ, (one, other)| differ | (one ^ other));
    std::hint::black_box(differ) == 0
}

fn user_and_password(header: &HeaderValue) -> Option<(String, Vec<u8>)> {
    let (scheme, code) = header.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let both = STANDARD.decode(code.trim()).ok()?;
    let colon = both.iter().position(|byte| *byte == b':')?;
    let (user, password) = both.split_at(colon);
    Some((String::from_utf8(user.to_vec()).ok()?, password.get(1..)?.to_vec()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use futures_util::FutureExt as _;

    use super::*;
    use crate::config::web::parse;
    use crate::randomness::SystemRandomness;

    /// Of `secret` and of `other`, with the lowest cost.
    const USERS: &str = "basic_auth_users:\n  a: $2y$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n  \
                         b: $2b$04$ZbcdefghijklmnopqrstuOJSno.bzBEKw9Uh.TDJQXdb1n5/tM8om\n";

    fn header(user: &str, password: &str) -> HeaderValue {
        HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))).unwrap()
    }

    #[tokio::test]
    async fn what_is_remembered_waits_for_nobody_and_guesses_do_not_push_it_out() {
        let users = parse(USERS, "web.yml", Path::new("")).unwrap().users;
        let passwords = Passwords::new(&SystemRandomness);
        assert_eq!(passwords.check(&users, &header("a", "secret")).await, Verdict::Right);
        // The right password of another user, too.
        assert_eq!(passwords.check(&users, &header("a", "other")).await, Verdict::Wrong);
        // An unknown user is checked against the first one's hash.
        assert_eq!(passwords.check(&users, &header("nobody", "secret")).await, Verdict::Wrong);
        for guess in 0..2 * REMEMBERED_MAX {
            assert_eq!(passwords.check(&users, &header("a", &guess.to_string())).await, Verdict::Wrong);
        }
        let turn = passwords.turn.acquire().await.unwrap();
        let at_once = |user, password| passwords.check(&users, &header(user, password)).now_or_never();
        assert_eq!(at_once("a", "secret"), Some(Verdict::Right));
        assert_eq!(at_once("a", "127"), Some(Verdict::Wrong));
        assert_eq!(at_once("a", "0"), None, "forgotten, and bcrypt is at work for another");
        assert_eq!(at_once("b", "secret"), None, "each user has a password of its own");
        assert_eq!(at_once("nobody", "x"), None, "it costs as much as a known one");
        let header = header("b", "other");
        let mut waiting: Vec<_> =
            (0..WAITING_MAX).map(|_| Box::pin(passwords.check(&users, &header))).collect();
        for check in &mut waiting {
            assert_eq!(futures_util::poll!(check), std::task::Poll::Pending);
        }
        assert_eq!(at_once("b", "x"), Some(Verdict::Busy));
        assert_eq!(at_once("a", "secret"), Some(Verdict::Right));
        drop(turn);
        for check in waiting {
            assert_eq!(check.await, Verdict::Right);
        }
    }
}
