//! A simulated Exoscale, and simulated implementations of the seams.
//!
//! A [`world::World`] is an organisation with zones, instances, snapshots, templates and an object store. It is
//! driven by HTTP exchanges only, in this process ([`world::World::transport`]) or behind a socket
//! ([`world::World::serve`]), and behaves as the real service was seen to behave, also where that is unpleasant.
//! [`fault::Fault`]s make it behave worse, on demand. Tests and the demo arrange and inspect a world by the
//! methods of [`world::World`].
//!
//! It is a second, independent reading of the API: nothing here uses our client, and signatures are checked
//! by separate code. [`clock`], [`disk`], [`processes`] and [`randomness`] simulate the other seams.

mod answer;
mod api;
pub mod bucket;
pub mod call;
pub mod clock;
pub mod disk;
pub mod fault;
mod host;
pub mod http_server;
pub mod image;
pub mod processes;
pub mod randomness;
pub mod restic;
mod service;
mod signature;
mod store;
pub mod world;
