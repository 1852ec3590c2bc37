//! x
/// x
pub struct ForceNewCluster {}
/// x
pub fn force_new_cluster() {}
