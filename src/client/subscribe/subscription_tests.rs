//! Delivery in paused time.

use super::*;
