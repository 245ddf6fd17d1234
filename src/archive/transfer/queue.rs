//! Work that blocks, done in its order beside whoever gives it.
//!
//! A **lane** is a queue of bounded weight and a worker. Lanes are served by a **crew**: threads of the blocking pool that are
//! there only while there is work. So nothing blocks for longer than what is at hand, no thread waits for the network, and
//! nobody has to poll a lane for it to go on. A lane may have a crew of its own, or share one with others of its kind; a
//! thread of a shared crew may take what several lanes have at a time.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// What a lane does with each item.
pub(crate) trait Worker: Send + Sized + 'static {
    type Item: Send + 'static;

    /// Blocks. After an error nothing more is asked of it.
    fn work(&mut self, item: Self::Item) -> io::Result<()>;

    /// What several lanes do with an item each, if it is cheaper done at once.
    fn work_together(each: &mut [(Self, Option<Self::Item>)]) -> Vec<io::Result<()>> {
        each.iter_mut().map(|(worker, item)| item.take().map_or(Ok(()), |item| worker.work(item))).collect()
    }
}

/// Threads that serve lanes.
pub(crate) struct Pool<W: Worker> {
    threads_max: usize,
    /// So many lanes a thread takes at a time.
    together_max: usize,
    called: Mutex<Called<W>>,
}

/// Who waits for a thread, and how many there are.
struct Called<W: Worker> {
    lanes: VecDeque<Arc<Shared<W>>>,
    threads: usize,
}

/// A queue and its worker. Dropped, it forgets what waits in it; the item at hand is done to its end.
pub(crate) struct Queue<W: Worker> {
    shared: Arc<Shared<W>>,
    crew: Arc<Pool<W>>,
    room: Arc<Semaphore>,
    room_max: u32,
}

struct Shared<W: Worker> {
    state: Mutex<State<W>>,
    /// Told when there is nothing to do any more.
    rested: Notify,
}

struct State<W: Worker> {
    queue: VecDeque<(W::Item, OwnedSemaphorePermit)>,
    /// None while it is at work, and for ever if it panicked.
    worker: Option<W>,
    /// Something is at work or waits; the crew knows.
    is_busy: bool,
    /// The first failure.
    failure: Option<io::Error>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

impl<W: Worker> Queue<W> {
    /// A lane in which items of so much weight together may wait, with a crew of its own.
    pub(crate) fn new(worker: W, room_max: u32) -> Self {
        Self::on_pool(&Pool::new(1, 1), worker, room_max)
    }

    /// A lane in which items of so much weight together may wait.
    pub(crate) fn on_pool(crew: &Arc<Pool<W>>, worker: W, room_max: u32) -> Self {
        let state = State { queue: VecDeque::new(), worker: Some(worker), is_busy: false, failure: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), rested: Notify::new() });
        Self { shared, crew: Arc::clone(crew), room: Arc::new(Semaphore::new(room_max as usize)), room_max }
    }

    /// Hands an item over, as soon as there is room for it.
    ///
    /// # Errors
    /// An earlier item failed.
    pub(crate) async fn push(&self, item: W::Item, weight: usize) -> io::Result<()> {
        let weight = u32::try_from(weight).unwrap_or(u32::MAX).min(self.room_max);
        let room = Arc::clone(&self.room).acquire_many_owned(weight).await.map_err(io::Error::other)?;
        let mut state = lock(&self.shared.state);
        state.failure()?;
        state.queue.push_back((item, room));
        if !std::mem::replace(&mut state.is_busy, true) {
            drop(state);
            self.crew.call(Arc::clone(&self.shared));
        }
        Ok(())
    }

    /// Whether nothing is at work or waits.
    pub(crate) fn is_idle(&self) -> bool {
        !lock(&self.shared.state).is_busy
    }

    /// Waits until all that was handed over is done.
    ///
    /// # Errors
    /// An item failed.
    pub(crate) async fn rest(&self) -> io::Result<()> {
        loop {
            let mut rested = std::pin::pin!(self.shared.rested.notified());
            rested.as_mut().enable();
            {
                let state = lock(&self.shared.state);
                if !state.is_busy || state.failure.is_some() {
                    return state.failure();
                }
            }
            rested.await;
        }
    }

    /// Waits until all is done, and gives the worker back; none if it panicked.
    pub(crate) async fn into_worker(self) -> io::Result<W> {
        self.rest().await?;
        lock(&self.shared.state).worker.take().ok_or_else(|| io::Error::other("the work was lost"))
    }
}

impl<W: Worker> Drop for Queue<W> {
    fn drop(&mut self) {
        lock(&self.shared.state).queue.clear();
    }
}

impl<W: Worker> Pool<W> {
    /// At most so many threads (there is one at least), each of which takes what up to so many lanes have at a time.
    pub(crate) fn new(threads_max: usize, together_max: usize) -> Arc<Self> {
        let called = Mutex::new(Called { lanes: VecDeque::new(), threads: 0 });
        Arc::new(Self { threads_max, together_max, called })
    }

    fn call(self: &Arc<Self>, lane: Arc<Shared<W>>) {
        let mut called = lock(&self.called);
        called.lanes.push_back(lane);
        self.spawn_worker(&mut called);
    }

    /// One thread more, if there may be one.
    fn spawn_worker(self: &Arc<Self>, called: &mut Called<W>) {
        if called.threads < self.threads_max {
            called.threads += 1;
            let crew = Arc::clone(self);
            tokio::task::spawn_blocking(move || crew.serve());
        }
    }

    /// Works until nobody waits any more.
    fn serve(self: &Arc<Self>) {
        while let Some(mut lanes) = self.next() {
            turn(&lanes);
            lanes.retain(|lane| {
                let mut state = lock(&lane.state);
                state.is_busy = !state.queue.is_empty();
                if !state.is_busy {
                    lane.rested.notify_waiters();
                }
                state.is_busy
            });
            let mut called = lock(&self.called);
            called.lanes.extend(lanes);
            if called.lanes.len() > self.share(&called) {
                self.spawn_worker(&mut called);
            }
        }
    }

    /// So many of those that wait are one thread's: several only where the threads do not suffice.
    fn share(&self, called: &Called<W>) -> usize {
        called.lanes.len().div_ceil(self.threads_max).min(self.together_max)
    }

    /// Those that are served next; none if the thread is not needed any more.
    fn next(&self) -> Option<Vec<Arc<Shared<W>>>> {
        let mut called = lock(&self.called);
        let count = self.share(&called);
        if count == 0 {
            called.threads -= 1;
            return None;
        }
        Some(called.lanes.drain(..count).collect())
    }
}

/// Does the next item of each of these lanes.
fn turn<W: Worker>(lanes: &[Arc<Shared<W>>]) {
    let (mut busy, mut each, mut rooms) = (Vec::new(), Vec::new(), Vec::new());
    for lane in lanes {
        let mut state = lock(&lane.state);
        if let Some((item, room)) = state.queue.pop_front() {
            match state.worker.take() {
                Some(worker) => each.push((worker, Some(item))),
                None => continue,
            }
            busy.push(lane);
            rooms.push(room);
        }
    }
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| W::work_together(&mut each)));
    let Ok(done) = done else {
        // Their workers are lost. The panic was told by the hook.
        for lane in busy {
            lock(&lane.state).fail(io::Error::other("the work panicked"));
        }
        return;
    };
    for ((lane, (worker, _)), done) in busy.into_iter().zip(each).zip(done) {
        let mut state = lock(&lane.state);
        state.worker = Some(worker);
        if let Err(failure) = done {
            state.fail(failure);
        }
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
        let lane = Queue::new(Sum(0), 2);
        for item in [1, 2, 3, 4, 5, 6] {
            lane.push(item, 1).await.unwrap();
        }
        lane.rest().await.unwrap();
        assert!(lane.is_idle());
        assert_eq!(lane.into_worker().await.unwrap().0, 123_456);
    }

    #[tokio::test]
    async fn lanes_that_share_a_crew_each_keep_their_order() {
        let crew = Pool::new(2, 3);
        let lanes: Vec<_> = (0..9).map(|_| Queue::on_pool(&crew, Sum(0), 2)).collect();
        for item in [1, 2, 3, 4, 5, 6] {
            for lane in &lanes {
                lane.push(item, 1).await.unwrap();
            }
        }
        for lane in lanes {
            assert_eq!(lane.into_worker().await.unwrap().0, 123_456);
        }
    }

    #[tokio::test]
    async fn what_fails_in_one_lane_is_no_matter_to_another() {
        let crew = Pool::new(1, 1);
        let lanes: Vec<_> = (0..3).map(|_| Queue::on_pool(&crew, Sum(0), 9)).collect();
        for (lane, items) in lanes.iter().zip([[7, 1], [13, 1], [2, 1]]) {
            for item in items {
                let _ = lane.push(item, 1).await;
            }
        }
        let [seven, panicked, good] = <[_; 3]>::try_from(lanes).ok().unwrap();
        assert!(seven.rest().await.is_err() && panicked.rest().await.is_err());
        assert_eq!(good.into_worker().await.unwrap().0, 21);
    }

    #[tokio::test]
    async fn a_failure_is_told_and_nothing_more_is_taken() {
        let lane = Queue::new(Sum(0), 100);
        lane.push(7, 1).await.unwrap();
        assert_eq!(lane.rest().await.unwrap_err().to_string(), "seven");
        lane.push(1, 1).await.unwrap_err();
        lane.rest().await.unwrap_err();
    }

    #[tokio::test]
    async fn a_panic_is_a_failure() {
        let lane = Queue::new(Sum(0), 100);
        lane.push(13, 1).await.unwrap();
        lane.rest().await.unwrap_err();
        assert!(lane.into_worker().await.is_err());
    }

    #[tokio::test]
    async fn what_weighs_more_than_there_is_room_for_passes_alone() {
        let lane = Queue::new(Sum(0), 4);
        for item in [1, 2, 3] {
            lane.push(item, 1 << 40).await.unwrap();
        }
        assert_eq!(lane.into_worker().await.unwrap().0, 123);
    }
}
