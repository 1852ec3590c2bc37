//! A retry budget: retries stop when too large a share of the calls fail, so
//! that they do not multiply the load of a server in trouble.
//!
//! The rule is gRPC's proposal A6: a failure takes one token, a success gives
//! back a part of one, and retries are allowed while more than half are there.

/// The size of the budget, in thousandths of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetOptions {
    /// The most tokens there can be, in thousandths; the budget starts full.
    pub milli_tokens_max: u32,
    /// What a success gives back, in thousandths of a token. 100 lets about one
    /// call in ten be a retry in the long run.
    pub milli_tokens_per_success: u32,
}

impl Default for BudgetOptions {
    fn default() -> Self {
        BudgetOptions { milli_tokens_max: 10_000, milli_tokens_per_success: 100 }
    }
}

/// The tokens of one client or one peer.
#[derive(Clone, Debug)]
pub struct Budget {
    options: BudgetOptions,
    milli_tokens: u32,
}

/// What a failure takes.
const MILLI_TOKENS_PER_FAILURE: u32 = 1_000;

impl Budget {
    /// A full budget.
    pub fn new(options: BudgetOptions) -> Budget {
        Budget { options, milli_tokens: options.milli_tokens_max }
    }

    /// A call worked.
    pub fn on_success(&mut self) {
        let more = self.milli_tokens.saturating_add(self.options.milli_tokens_per_success);
        self.milli_tokens = more.min(self.options.milli_tokens_max);
    }

    /// A call failed in a way that a retry might mend. Returns whether it may
    /// be retried.
    pub fn on_failure(&mut self) -> bool {
        self.milli_tokens = self.milli_tokens.saturating_sub(MILLI_TOKENS_PER_FAILURE);
        self.may_retry()
    }

    /// Pays for a call that is made on suspicion, beside one that has not failed.
    /// Returns whether it may be made; nothing is taken when it may not.
    pub fn spend(&mut self) -> bool {
        let allowed = self.may_retry();
        if allowed {
            self.milli_tokens = self.milli_tokens.saturating_sub(MILLI_TOKENS_PER_FAILURE);
        }
        allowed
    }

    /// The tokens that are there, in thousandths.
    pub fn milli_tokens(&self) -> u32 {
        self.milli_tokens
    }

    /// Whether retries are allowed now.
    pub fn may_retry(&self) -> bool {
        self.milli_tokens > self.options.milli_tokens_max / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_stop_at_half_and_come_back_with_successes() {
        let mut budget = Budget::new(BudgetOptions::default());
        let allowed = (0..10).filter(|_| budget.on_failure()).count();
        assert_eq!(allowed, 4);
        for _ in 0..50 {
            budget.on_success();
        }
        assert!(!budget.may_retry());
        budget.on_success();
        assert!(budget.may_retry());
    }

    #[test]
    fn suspicion_is_paid_for_and_stops_at_half() {
        let mut budget = Budget::new(BudgetOptions::default());
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 5);
        assert_eq!(budget.milli_tokens(), 5_000, "what is refused costs nothing");
    }

    #[test]
    fn it_neither_overflows_nor_underflows() {
        let mut budget =
            Budget::new(BudgetOptions { milli_tokens_max: 500, milli_tokens_per_success: u32::MAX });
        for _ in 0..5 {
            budget.on_failure();
        }
        assert!(!budget.may_retry());
        budget.on_success();
        assert_eq!(budget.milli_tokens, 500);
    }
}
