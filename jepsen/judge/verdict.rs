//! What a checker says about a history.

/// The answer about one claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The claim, in words that make a sentence: "no acknowledged write is lost".
    pub claim: &'static str,
    /// How many things were looked at; a claim about nothing proves nothing.
    pub checked: usize,
    pub outcome: Held,
    /// What else was seen; it decides nothing. Empty mostly.
    pub note: String,
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
        Verdict::new(claim, checked, outcome)
    }

    pub fn new(claim: &'static str, checked: usize, outcome: Held) -> Verdict {
        Verdict { claim, checked, outcome, note: String::new() }
    }

    /// A verdict from what was found, if anything; without findings it is undecided where there is a reason.
    pub fn unless(
        claim: &'static str,
        checked: usize,
        findings: Vec<String>,
        doubt: Option<String>,
    ) -> Verdict {
        match doubt {
            Some(why) if findings.is_empty() => Verdict::new(claim, checked, Held::Undecided(why)),
            _ => Verdict::from_findings(claim, checked, findings),
        }
    }

    /// Whether the claim holds.
    pub fn held(&self) -> bool {
        self.outcome == Held::Yes
    }
}
