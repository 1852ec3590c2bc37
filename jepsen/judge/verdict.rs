//! What a checker says about a history.

/// The answer about one claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The claim, in words that make a sentence: "no acknowledged write is lost".
    pub claim: &'static str,
    /// How many things were looked at; a claim about nothing proves nothing.
    pub checked: usize,
    pub outcome: Held,
}

/// Whether a claim holds. Undecided counts as a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    Yes,
    /// Each finding names the calls or events that contradict the claim.
    No(Vec<String>),
    Undecided(String),
}

impl Verdict {
    /// A verdict from what was found: none is good.
    pub fn from_findings(claim: &'static str, checked: usize, findings: Vec<String>) -> Verdict {
        let outcome = if findings.is_empty() { Held::Yes } else { Held::No(findings) };
        Verdict { claim, checked, outcome }
    }

    /// Whether the claim holds.
    pub fn held(&self) -> bool {
        self.outcome == Held::Yes
    }
}
