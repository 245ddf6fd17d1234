//! Blocking work, done in order beside its caller.
//!
//! A **queue** holds items up to a total weight, and has a **worker** that processes them one by one. The threads of a **pool**
//! run the workers; they exist only while there is work, on tokio's blocking pool. So no thread waits for the network, and
//! a queue continues without being polled. A queue may have a pool of its own, or share one with others of its kind; a thread
//! of a shared pool may process an item each of several queues together.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::disk::begin_blocking;

/// Processes the items of a queue.
pub(crate) trait Worker: Send + Sized + 'static {
    type Item: Send + 'static;

    /// May block. After an error it is not called again.
    fn work(&mut self, item: Self::Item) -> io::Result<()>;

    /// Processes an item each of several queues, where that is cheaper done together.
    fn work_together(each: &mut [(Self, Option<Self::Item>)]) -> Vec<io::Result<()>> {
        each.iter_mut().map(|(worker, item)| item.take().map_or(Ok(()), |item| worker.work(item))).collect()
    }
}

/// Threads that run the workers of queues.
pub(crate) struct Pool<W: Worker> {
    threads_max: usize,
    /// The most queues that one thread serves at a time.
    together_max: usize,
    waiting: Mutex<Waiting<W>>,
}

/// The queues that wait for a thread, and the number of threads.
struct Waiting<W: Worker> {
    queues: VecDeque<Arc<Core<W>>>,
    threads: usize,
}

/// A queue and its worker. When it is dropped, the items in it are dropped too; the one that is processed is finished.
pub(crate) struct Queue<W: Worker> {
    core: Arc<Core<W>>,
    pool: Arc<Pool<W>>,
    capacity: Arc<Semaphore>,
    weight_max: u32,
}

struct Core<W: Worker> {
    state: Mutex<State<W>>,
    /// Notified when the last item is done.
    idle: Notify,
}

struct State<W: Worker> {
    items: VecDeque<(W::Item, OwnedSemaphorePermit)>,
    /// None while it processes an item, and from then on if it panicked.
    worker: Option<W>,
    /// Items are processed or waiting, and the pool has the queue.
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
        self.items.clear();
    }

    /// The first failure is the answer to every call from then on.
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
    /// A queue of items that together weigh at most `weight_max`, with a pool of its own.
    pub(crate) fn new(worker: W, weight_max: u32) -> Self {
        Self::on_pool(&Pool::new(1, 1), worker, weight_max)
    }

    /// A queue of items that together weigh at most `weight_max`.
    pub(crate) fn on_pool(pool: &Arc<Pool<W>>, worker: W, weight_max: u32) -> Self {
        let state = State { items: VecDeque::new(), worker: Some(worker), is_busy: false, failure: None };
        let core = Arc::new(Core { state: Mutex::new(state), idle: Notify::new() });
        Self {
            core,
            pool: Arc::clone(pool),
            capacity: Arc::new(Semaphore::new(weight_max as usize)),
            weight_max,
        }
    }

    /// Adds an item, as soon as its weight fits; one that is heavier than the queue passes alone.
    ///
    /// # Errors
    /// An earlier item failed.
    pub(crate) async fn push(&self, item: W::Item, weight: usize) -> io::Result<()> {
        let weight = u32::try_from(weight).unwrap_or(u32::MAX).min(self.weight_max);
        let permit = Arc::clone(&self.capacity).acquire_many_owned(weight).await.map_err(io::Error::other)?;
        let mut state = lock(&self.core.state);
        state.failure()?;
        state.items.push_back((item, permit));
        if !std::mem::replace(&mut state.is_busy, true) {
            drop(state);
            self.pool.enqueue(Arc::clone(&self.core));
        }
        Ok(())
    }

    /// Whether all items are done.
    pub(crate) fn is_idle(&self) -> bool {
        !lock(&self.core.state).is_busy
    }

    /// Waits until all items are done.
    ///
    /// # Errors
    /// An item failed.
    pub(crate) async fn wait_idle(&self) -> io::Result<()> {
        loop {
            let mut idle = std::pin::pin!(self.core.idle.notified());
            idle.as_mut().enable();
            {
                let state = lock(&self.core.state);
                if !state.is_busy || state.failure.is_some() {
                    return state.failure();
                }
            }
            idle.await;
        }
    }

    /// Waits until all items are done, and returns the worker. An error if it panicked.
    pub(crate) async fn into_worker(self) -> io::Result<W> {
        self.wait_idle().await?;
        lock(&self.core.state).worker.take().ok_or_else(|| io::Error::other("the work was lost"))
    }
}

impl<W: Worker> Drop for Queue<W> {
    fn drop(&mut self) {
        // A thread that has just done the last item may have hold of the core for a moment longer. The worker is dropped
        // here, so that what it holds (a lock) is free as soon as an idle queue is dropped.
        let mut state = lock(&self.core.state);
        let unused = (std::mem::take(&mut state.items), state.worker.take());
        drop(state);
        drop(unused);
    }
}

impl<W: Worker> Pool<W> {
    /// At least one thread; each serves up to `together_max` queues at a time.
    pub(crate) fn new(threads_max: usize, together_max: usize) -> Arc<Self> {
        let waiting = Mutex::new(Waiting { queues: VecDeque::new(), threads: 0 });
        Arc::new(Self { threads_max, together_max, waiting })
    }

    fn enqueue(self: &Arc<Self>, queue: Arc<Core<W>>) {
        let mut waiting = lock(&self.waiting);
        waiting.queues.push_back(queue);
        self.spawn_worker(&mut waiting);
    }

    /// Starts a thread, if there may be one more.
    fn spawn_worker(self: &Arc<Self>, waiting: &mut Waiting<W>) {
        if waiting.threads < self.threads_max {
            waiting.threads += 1;
            let pool = Arc::clone(self);
            drop(begin_blocking(move || pool.serve()));
        }
    }

    /// Runs workers until no queue waits any more.
    fn serve(self: &Arc<Self>) {
        while let Some(mut queues) = self.next() {
            process_next(&queues);
            queues.retain(|queue| {
                let mut state = lock(&queue.state);
                state.is_busy = !state.items.is_empty();
                if !state.is_busy {
                    queue.idle.notify_waiters();
                }
                state.is_busy
            });
            let mut waiting = lock(&self.waiting);
            waiting.queues.extend(queues);
            if waiting.queues.len() > self.queues_per_thread(&waiting) {
                self.spawn_worker(&mut waiting);
            }
        }
    }

    /// Several only where there are more queues than threads.
    fn queues_per_thread(&self, waiting: &Waiting<W>) -> usize {
        waiting.queues.len().div_ceil(self.threads_max).min(self.together_max)
    }

    /// The queues to serve next; none if the thread is not needed any more.
    fn next(&self) -> Option<Vec<Arc<Core<W>>>> {
        let mut waiting = lock(&self.waiting);
        let count = self.queues_per_thread(&waiting);
        if count == 0 {
            waiting.threads -= 1;
            return None;
        }
        Some(waiting.queues.drain(..count).collect())
    }
}

/// Processes the next item of each of these queues.
fn process_next<W: Worker>(queues: &[Arc<Core<W>>]) {
    let (mut busy, mut each, mut permits) = (Vec::new(), Vec::new(), Vec::new());
    for queue in queues {
        let mut state = lock(&queue.state);
        if let Some((item, permit)) = state.items.pop_front() {
            match state.worker.take() {
                Some(worker) => each.push((worker, Some(item))),
                None => continue,
            }
            busy.push(queue);
            permits.push(permit);
        }
    }
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| W::work_together(&mut each)));
    let Ok(done) = done else {
        // Their workers are lost. The panic hook has reported it.
        drop(each);
        for queue in busy {
            lock(&queue.state).fail(io::Error::other("the work panicked"));
        }
        return;
    };
    for ((queue, (worker, _)), done) in busy.into_iter().zip(each).zip(done) {
        let mut state = lock(&queue.state);
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
        let queue = Queue::new(Sum(0), 2);
        for item in [1, 2, 3, 4, 5, 6] {
            queue.push(item, 1).await.unwrap();
        }
        queue.wait_idle().await.unwrap();
        assert!(queue.is_idle());
        assert_eq!(queue.into_worker().await.unwrap().0, 123_456);
    }

    #[tokio::test]
    async fn queues_that_share_a_pool_each_keep_their_order() {
        let pool = Pool::new(2, 3);
        let queues: Vec<_> = (0..9).map(|_| Queue::on_pool(&pool, Sum(0), 2)).collect();
        for item in [1, 2, 3, 4, 5, 6] {
            for queue in &queues {
                queue.push(item, 1).await.unwrap();
            }
        }
        for queue in queues {
            assert_eq!(queue.into_worker().await.unwrap().0, 123_456);
        }
    }

    #[tokio::test]
    async fn what_fails_in_one_queue_is_no_matter_to_another() {
        let pool = Pool::new(1, 1);
        let queues: Vec<_> = (0..3).map(|_| Queue::on_pool(&pool, Sum(0), 9)).collect();
        for (queue, items) in queues.iter().zip([[7, 1], [13, 1], [2, 1]]) {
            for item in items {
                let _ = queue.push(item, 1).await;
            }
        }
        let [seven, panicked, good] = <[_; 3]>::try_from(queues).ok().unwrap();
        assert!(seven.wait_idle().await.is_err() && panicked.wait_idle().await.is_err());
        assert_eq!(good.into_worker().await.unwrap().0, 21);
    }

    #[tokio::test]
    async fn a_failure_is_returned_and_nothing_more_is_taken() {
        let queue = Queue::new(Sum(0), 100);
        queue.push(7, 1).await.unwrap();
        assert_eq!(queue.wait_idle().await.unwrap_err().to_string(), "seven");
        queue.push(1, 1).await.unwrap_err();
        queue.wait_idle().await.unwrap_err();
    }

    #[tokio::test]
    async fn an_idle_queue_that_is_dropped_drops_its_worker_at_once() {
        struct Holder(#[expect(dead_code, reason = "it is held, not read")] Arc<()>);
        impl Worker for Holder {
            type Item = ();
            fn work(&mut self, (): ()) -> io::Result<()> {
                Ok(())
            }
        }
        let held = Arc::new(());
        let queue = Queue::new(Holder(Arc::clone(&held)), 1);
        queue.push((), 1).await.unwrap();
        queue.wait_idle().await.unwrap();
        // As a thread has it that did the last item and was not scheduled since.
        let of_the_thread = Arc::clone(&queue.core);
        drop(queue);
        assert_eq!(Arc::strong_count(&held), 1);
        drop(of_the_thread);
    }

    #[tokio::test]
    async fn a_panic_is_a_failure() {
        let queue = Queue::new(Sum(0), 100);
        queue.push(13, 1).await.unwrap();
        queue.wait_idle().await.unwrap_err();
        assert!(queue.into_worker().await.is_err());
    }

    #[tokio::test]
    async fn what_is_heavier_than_the_queue_passes_alone() {
        let queue = Queue::new(Sum(0), 4);
        for item in [1, 2, 3] {
            queue.push(item, 1 << 40).await.unwrap();
        }
        assert_eq!(queue.into_worker().await.unwrap().0, 123);
    }
}
