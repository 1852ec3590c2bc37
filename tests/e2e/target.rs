//! What is under test: Mainstay by default, or a real etcd to prove the tests
//! themselves. Decides only names, paths and versions; starts nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The program under test.
#[derive(Clone, Debug)]
pub enum Target {
    /// The binary of this crate.
    Mainstay(PathBuf),
    /// An etcd binary with its version as (major, minor).
    Etcd(PathBuf, (u32, u32)),
}

impl Target {
    /// The target the environment names, found out once.
    pub fn get() -> &'static Target {
        static TARGET: OnceLock<Target> = OnceLock::new();
        TARGET.get_or_init(|| match std::env::var("MAINSTAY_TEST_TARGET") {
            Err(_) => Target::mainstay(),
            Ok(name) if name == "mainstay" => Target::mainstay(),
            Ok(path) => Target::etcd(&path),
        })
    }

    /// The binary of this crate.
    pub fn mainstay() -> Target {
        Target::Mainstay(mainstay_binary())
    }

    /// An etcd binary, on the PATH or by its own path.
    pub fn etcd(binary: &str) -> Target {
        Target::Etcd(PathBuf::from(binary), etcd_version(Path::new(binary)))
    }

    /// The command that starts a server, flags still to be added.
    pub fn serve(&self) -> (PathBuf, Vec<String>) {
        match self {
            Target::Mainstay(path) => (path.clone(), vec!["serve".into()]),
            Target::Etcd(path, _) => (path.clone(), Vec::new()),
        }
    }
}

/// Whether the target is etcd.
pub fn is_etcd() -> bool {
    matches!(Target::get(), Target::Etcd(..))
}

/// Whether the target is an etcd older than `version`: what came later cannot be asked of it.
pub fn etcd_before(version: (u32, u32)) -> bool {
    match Target::get() {
        Target::Mainstay(_) => false,
        Target::Etcd(_, has) if *has < version => {
            eprintln!("not asked of etcd {}.{}: came with {}.{}", has.0, has.1, version.0, version.1);
            true
        }
        Target::Etcd(..) => false,
    }
}

/// Whether the test is of something etcd does not have at all.
pub fn not_in_etcd(what: &str) -> bool {
    if is_etcd() {
        eprintln!("not asked of etcd: {what}");
    }
    is_etcd()
}

/// The `mainstay` binary itself, whatever the target.
pub fn mainstay_binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_mainstay"))
}

/// Finds a foreign tool on the PATH. Missing in CI fails the test; elsewhere it is skipped, loudly.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

/// Says loudly that a test proves nothing here; in CI that is a failure.
pub fn skip(why: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}, and CI must run every test");
    eprintln!("######## SKIPPED: {why} ########");
}

fn etcd_version(binary: &Path) -> (u32, u32) {
    let output = Command::new(binary).arg("--version").output().expect("the etcd under test runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().nth(2).expect("`etcd --version` prints one").to_owned();
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}
