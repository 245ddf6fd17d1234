//! A simulated Exoscale, and the simulated forms of the seams.
//!
//! A [`world::World`] is an organisation with zones, instances, snapshots, templates and an object store. It is
//! driven by HTTP exchanges only, in this process ([`world::World::transport`]) or behind a socket
//! ([`world::World::serve`]), and behaves as the real service was seen to behave, also where that is unpleasant.
//! [`fault::Fault`]s make it behave worse, on demand. Tests and the demo arrange a world and look at what became
//! of it by the methods of [`world::World`].
//!
//! It is a second, independent reading of the API: nothing here knows our client, and signatures are checked
//! by code of its own. [`clock`], [`disk`] and [`randomness`] hold the other seams' simulated forms.

mod answer;
mod api;
pub mod call;
pub mod clock;
pub mod disk;
pub mod fault;
pub mod image;
pub mod loopback;
mod place;
pub mod randomness;
mod signature;
mod store;
pub mod world;
