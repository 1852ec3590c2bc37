//! What filters match, what they cover, and how they refuse.

use super::*;
