//! Queues against models.

use super::*;
