//! The marker that says whose disk this is.
//!
//! It is written before anything else of a data directory and after that only
//! gains what the node has learned: a disk that was a member's never becomes
//! another's. It is text, so that an operator can read it, with a checksum, so
//! that a damaged one is not believed.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::StorageError;
use crate::types::{ClusterId, DiskId, NodeId};

/// The layout of a data directory that this version reads and writes. In 1 the
/// log was a RocksDB database.
const FORMAT: u32 = 2;

/// Whose disk this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Drawn at random when the directory was first used. Never 0.
    pub disk: DiskId,
    /// What the node on this disk is to a cluster.
    pub standing: Standing,
}

/// What a node is to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has not been told of any cluster.
    Unclaimed,
    /// It knows its ids and may have asked to be let in; a retry asks with the same.
    Joining {
        /// The cluster.
        cluster: ClusterId,
        /// Its own id there.
        node: NodeId,
    },
    /// Its log has been part of the cluster's: starting without it could lose
    /// what was acknowledged.
    Member {
        /// The cluster.
        cluster: ClusterId,
        /// Its own id there.
        node: NodeId,
    },
}

/// The marker as text. Ids are hexadecimal, as they are printed everywhere.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marker {
    format: u32,
    disk: String,
    standing: String,
    cluster: Option<String>,
    node: Option<String>,
}

impl Identity {
    /// The ids of the cluster and of this node, once they are known.
    pub fn ids(&self) -> Option<(ClusterId, NodeId)> {
        match self.standing {
            Standing::Unclaimed => None,
            Standing::Joining { cluster, node } | Standing::Member { cluster, node } => Some((cluster, node)),
        }
    }

    /// Whether the log on this disk must be there.
    pub fn is_member(&self) -> bool {
        matches!(self.standing, Standing::Member { .. })
    }

    /// Checks that the disk is this node's, or nobody's yet.
    ///
    /// # Errors
    /// [`StorageError::Refused`], saying what to do.
    pub fn check(&self, cluster: ClusterId, node: NodeId) -> Result<(), StorageError> {
        match self.ids() {
            Some((own_cluster, own_node)) if (own_cluster, own_node) != (cluster, node) => {
                Err(StorageError::Refused(format!(
                    "the data directory belongs to node {own_node:x} of cluster {own_cluster:x}, but this \
                     process was started as node {node:x} of cluster {cluster:x}; start it with that \
                     node's data directory, or with an empty one to join as a new member"
                )))
            }
            _ => Ok(()),
        }
    }

    /// The identity after the node has come to stand as `standing`.
    ///
    /// # Errors
    /// [`StorageError::Refused`] when that would make it another node, or less
    /// than the member it is.
    pub fn advance(self, standing: Standing) -> Result<Identity, StorageError> {
        let next = Identity { standing, ..self };
        if let Some((cluster, node)) = next.ids() {
            self.check(cluster, node)?;
        }
        let goes_back = match (self.standing, standing) {
            (Standing::Unclaimed, _) | (_, Standing::Member { .. }) => false,
            (Standing::Joining { .. }, Standing::Joining { .. }) => false,
            (Standing::Joining { .. } | Standing::Member { .. }, _) => true,
        };
        if goes_back {
            return Err(StorageError::Refused(format!(
                "the data directory is marked {:?} and cannot go back to {standing:?}; use an empty one",
                self.standing
            )));
        }
        Ok(next)
    }

    /// The marker as it stands in its file.
    pub fn encode(&self) -> String {
        let hex = |id: u64| format!("{id:x}");
        let standing = match self.standing {
            Standing::Unclaimed => "unclaimed",
            Standing::Joining { .. } => "joining",
            Standing::Member { .. } => "member",
        };
        let marker = Marker {
            format: FORMAT,
            disk: hex(self.disk),
            standing: standing.to_owned(),
            cluster: self.ids().map(|(cluster, _)| hex(cluster)),
            node: self.ids().map(|(_, node)| hex(node)),
        };
        let line = serde_json::to_string(&marker).expect("strings and numbers always encode");
        format!("{line}\ncrc32c {:08x}\n", crc32c::crc32c(line.as_bytes()))
    }

    /// What [`Identity::encode`] wrote.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(text: &[u8]) -> Result<Identity, String> {
        let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
        let mut lines = text.lines();
        let (line, seal) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        let computed = format!("crc32c {:08x}", crc32c::crc32c(line.as_bytes()));
        if seal != computed || lines.next().is_some() {
            return Err(format!("its last line should be {computed:?}"));
        }
        let marker: Marker = serde_json::from_str(line).map_err(|error| error.to_string())?;
        if marker.format != FORMAT {
            return Err(format!(
                "format {} was written by another version of Mainstay; this one reads {FORMAT}",
                marker.format
            ));
        }
        let id = |name: &str, text: Option<&str>| {
            let number = text.and_then(|text| u64::from_str_radix(text, 16).ok());
            number.filter(|id| *id != 0).ok_or_else(|| format!("it has no valid {name} id"))
        };
        let ids = || -> Result<(ClusterId, NodeId), String> {
            Ok((id("cluster", marker.cluster.as_deref())?, id("node", marker.node.as_deref())?))
        };
        let standing = match marker.standing.as_str() {
            "unclaimed" => Standing::Unclaimed,
            "joining" => ids().map(|(cluster, node)| Standing::Joining { cluster, node })?,
            "member" => ids().map(|(cluster, node)| Standing::Member { cluster, node })?,
            other => return Err(format!("standing {other:?} is unknown to this version")),
        };
        let identity = Identity { disk: id("disk", Some(&marker.disk))?, standing };
        // Only a program writes it, and always whole: anything else is damage with a good checksum.
        match identity.encode() == text {
            true => Ok(identity),
            false => Err("it says more or less than this version writes".to_owned()),
        }
    }

    /// Reads the marker in `path`; `None` when there is none.
    ///
    /// # Errors
    /// [`StorageError::Refused`] for a damaged marker, saying what to do;
    /// [`StorageError::Io`] when it cannot be read.
    pub(super) fn read(path: &Path) -> Result<Option<Identity>, StorageError> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StorageError::Io { path: path.to_owned(), source }),
        };
        Identity::decode(&text).map(Some).map_err(|reason| {
            StorageError::Refused(format!(
                "{} cannot be trusted: {reason}; remove this member from the cluster and let it join \
                 again with an empty data directory",
                path.display()
            ))
        })
    }

    /// Writes the marker to `path`, durably and all or nothing.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub(super) fn write(&self, path: &Path) -> Result<(), StorageError> {
        replace_file(path, self.encode().as_bytes())
    }
}

/// Puts `content` in the place of the file `path`: after a crash it is the old
/// file or the new one, and once this returns it is the new one.
pub(super) fn replace_file(path: &Path, content: &[u8]) -> Result<(), StorageError> {
    let temporary = PathBuf::from(format!("{}.tmp", path.display()));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|source| StorageError::Io { path: path.to_owned(), source })?;
    match path.parent() {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

/// Makes what was created, renamed or removed in a directory durable.
pub(super) fn sync_dir(path: &Path) -> Result<(), StorageError> {
    let sync = || File::open(path)?.sync_all();
    sync().map_err(|source| StorageError::Io { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MEMBER: Identity = Identity { disk: 0xd, standing: Standing::Member { cluster: 0xc, node: 0xa } };

    #[test]
    fn the_marker_is_readable_and_its_format_holds_still() {
        let line = r#"{"format":2,"disk":"d","standing":"member","cluster":"c","node":"a"}"#;
        assert_eq!(MEMBER.encode(), format!("{line}\ncrc32c {:08x}\n", crc32c::crc32c(line.as_bytes())));
    }

    #[test]
    fn it_is_written_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("IDENTITY");
        assert_eq!(Identity::read(&path).unwrap(), None);
        let ids = [
            Identity { disk: u64::MAX, standing: Standing::Unclaimed },
            Identity { disk: 1, standing: Standing::Joining { cluster: 2, node: 3 } },
            MEMBER,
        ];
        for identity in ids {
            identity.write(&path).unwrap();
            assert_eq!(Identity::read(&path).unwrap(), Some(identity));
        }
    }

    #[test]
    fn a_damaged_marker_is_refused_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("IDENTITY");
        let text = MEMBER.encode().into_bytes();
        for at in 0..text.len() {
            let mut damaged = text.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            let error = Identity::read(&path).unwrap_err().to_string();
            assert!(error.contains("join again"), "byte {at}: {error}");
        }
    }

    #[test]
    fn a_foreign_disk_is_refused_with_advice() {
        assert!(MEMBER.check(0xc, 0xa).is_ok());
        let error = MEMBER.check(0xc, 0xb).unwrap_err().to_string();
        assert!(error.contains("belongs to node a of cluster c"), "{error}");
    }

    #[test]
    fn a_disk_never_becomes_anothers_nor_less_than_it_is() {
        let fresh = Identity { disk: 7, standing: Standing::Unclaimed };
        let joining = fresh.advance(Standing::Joining { cluster: 1, node: 2 }).unwrap();
        let member = joining.advance(Standing::Member { cluster: 1, node: 2 }).unwrap();
        assert!(joining.advance(Standing::Member { cluster: 1, node: 3 }).is_err());
        assert!(joining.advance(Standing::Unclaimed).is_err());
        assert!(member.advance(Standing::Joining { cluster: 1, node: 2 }).is_err());
        assert_eq!(member.advance(Standing::Member { cluster: 1, node: 2 }).unwrap(), member);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let _ = Identity::decode(&bytes);
        }
    }
}
