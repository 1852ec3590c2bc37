//! A cache as a whole, over a store that the tests hold in their hands.

mod disk;
mod model;
mod reads;
mod store;
