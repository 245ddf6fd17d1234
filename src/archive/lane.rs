//! Work that blocks, done in its order beside whoever gives it.
//!
//! A **lane** is a queue of bounded weight and a worker that is at work on the blocking pool only while there is something
//! in it. So nothing blocks for longer than what is at hand, no thread waits for the network, and nobody has to poll the
//! lane for it to go on.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// What a lane does with each item.
pub(super) trait Worker: Send + 'static {
    type Item: Send + 'static;

    /// Blocks. After an error nothing more is asked of it.
    fn work(&mut self, item: Self::Item) -> io::Result<()>;
}

/// A queue and its worker. Dropped, it forgets what waits in it; the item at hand is done to its end.
pub(super) struct Lane<W: Worker> {
    shared: Arc<Shared<W>>,
    room: Arc<Semaphore>,
    room_max: u32,
}

struct Shared<W: Worker> {
    state: Mutex<State<W>>,
    /// Told when the worker stops working.
    rested: Notify,
}

struct State<W: Worker> {
    queue: VecDeque<(W::Item, OwnedSemaphorePermit)>,
    /// None while it is at work, and for ever if it panicked.
    worker: Option<W>,
    /// The first failure.
    failure: Option<io::Error>,
}

impl<W: Worker> Shared<W> {
    fn state(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Worker> State<W> {
    fn fail(&mut self, failure: io::Error) {
        self.failure.get_or_insert(failure);
        self.queue.clear();
    }

    /// The failure, if there is one: whoever asks hears of it.
    fn failure(&self) -> io::Result<()> {
        match &self.failure {
            None => Ok(()),
            Some(failure) => Err(match failure.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(failure.kind(), failure.to_string()),
            }),
        }
    }
}

impl<W: Worker> Lane<W> {
    /// A lane in which items of so much weight together may wait.
    pub(super) fn new(worker: W, room_max: u32) -> Self {
        let state = State { queue: VecDeque::new(), worker: Some(worker), failure: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), rested: Notify::new() });
        Self { shared, room: Arc::new(Semaphore::new(room_max as usize)), room_max }
    }

    /// Hands an item over, as soon as there is room for it.
    ///
    /// # Errors
    /// An earlier item failed.
    pub(super) async fn push(&self, item: W::Item, weight: usize) -> io::Result<()> {
        let weight = u32::try_from(weight).unwrap_or(u32::MAX).min(self.room_max);
        let room = Arc::clone(&self.room).acquire_many_owned(weight).await.map_err(io::Error::other)?;
        let mut state = self.shared.state();
        state.failure()?;
        state.queue.push_back((item, room));
        if let Some(worker) = state.worker.take() {
            drop(state);
            let shared = Arc::clone(&self.shared);
            tokio::task::spawn_blocking(move || run(&shared, worker));
        }
        Ok(())
    }

    /// Whether nothing is at work or waits.
    pub(super) fn is_at_rest(&self) -> bool {
        self.shared.state().worker.is_some()
    }

    /// Waits until all that was handed over is done.
    ///
    /// # Errors
    /// An item failed.
    pub(super) async fn rest(&self) -> io::Result<()> {
        loop {
            let mut rested = std::pin::pin!(self.shared.rested.notified());
            rested.as_mut().enable();
            {
                let state = self.shared.state();
                if state.worker.is_some() || state.failure.is_some() {
                    return state.failure();
                }
            }
            rested.await;
        }
    }

    /// Waits until all is done, and gives the worker back; none if it panicked.
    pub(super) async fn into_worker(self) -> io::Result<W> {
        self.rest().await?;
        self.shared.state().worker.take().ok_or_else(|| io::Error::other("the work was lost"))
    }
}

impl<W: Worker> Drop for Lane<W> {
    fn drop(&mut self) {
        self.shared.state().queue.clear();
    }
}

/// Works until nothing waits any more.
fn run<W: Worker>(shared: &Shared<W>, mut worker: W) {
    let lost = Lost(shared);
    loop {
        let next = {
            let mut state = shared.state();
            let next = state.queue.pop_front();
            if next.is_none() {
                state.worker = Some(worker);
                drop(state);
                break;
            }
            next
        };
        let Some((item, room)) = next else { break };
        if let Err(failure) = worker.work(item) {
            shared.state().fail(failure);
        }
        drop(room);
    }
    drop(lost);
}

/// However the work ends, whoever waits for it hears of it.
struct Lost<'a, W: Worker>(&'a Shared<W>);

impl<W: Worker> Drop for Lost<'_, W> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.state().fail(io::Error::other("the work panicked"));
        }
        self.0.rested.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sum(u64);

    impl Worker for Sum {
        type Item = u64;
        fn work(&mut self, item: u64) -> io::Result<()> {
            assert_ne!(item, 13, "it panics at 13");
            self.0 = self.0 * 10 + item;
            if item == 7 { Err(io::Error::other("seven")) } else { Ok(()) }
        }
    }

    #[tokio::test]
    async fn items_are_done_in_their_order_and_the_worker_comes_back() {
        let lane = Lane::new(Sum(0), 2);
        for item in [1, 2, 3, 4, 5, 6] {
            lane.push(item, 1).await.unwrap();
        }
        lane.rest().await.unwrap();
        assert!(lane.is_at_rest());
        assert_eq!(lane.into_worker().await.unwrap().0, 123_456);
    }

    #[tokio::test]
    async fn a_failure_is_told_and_nothing_more_is_taken() {
        let lane = Lane::new(Sum(0), 100);
        lane.push(7, 1).await.unwrap();
        assert_eq!(lane.rest().await.unwrap_err().to_string(), "seven");
        lane.push(1, 1).await.unwrap_err();
        lane.rest().await.unwrap_err();
    }

    #[tokio::test]
    async fn a_panic_is_a_failure() {
        let lane = Lane::new(Sum(0), 100);
        lane.push(13, 1).await.unwrap();
        lane.rest().await.unwrap_err();
        assert!(lane.into_worker().await.is_err());
    }

    #[tokio::test]
    async fn what_weighs_more_than_there_is_room_for_passes_alone() {
        let lane = Lane::new(Sum(0), 4);
        for item in [1, 2, 3] {
            lane.push(item, 1 << 40).await.unwrap();
        }
        assert_eq!(lane.into_worker().await.unwrap().0, 123);
    }
}
