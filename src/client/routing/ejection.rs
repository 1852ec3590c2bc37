//! Who is left out: of the endpoints that are unwell, never more than half of
//! all, and nobody when more are unwell. Sending everything to the few that
//! still answer would bring those down too.

/// What is decided about one endpoint by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Calls and health checks say that it is well.
    pub is_well: bool,
    /// A given address that stands back while members can be used.
    pub is_spare: bool,
}

/// Which endpoints are left out, in their order.
///
/// Members and spare addresses are looked at apart. When no member is well but a
/// spare address is, all members are left out: the addresses that the members
/// tell may be good only where they are themselves.
pub fn ejected(cases: &[Case]) -> Vec<bool> {
    let well = |spare: bool| cases.iter().filter(|case| case.is_spare == spare && case.is_well).count();
    let all = |spare: bool| cases.iter().filter(|case| case.is_spare == spare).count();
    let ejects = |spare: bool| {
        let unwell = all(spare) - well(spare);
        2 * unwell <= all(spare)
    };
    let (members, spares) = (ejects(false) || (well(false) == 0 && well(true) > 0), ejects(true));
    cases.iter().map(|case| !case.is_well && if case.is_spare { spares } else { members }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members(well: &[bool]) -> Vec<Case> {
        well.iter().map(|is_well| Case { is_well: *is_well, is_spare: false }).collect()
    }

    #[test]
    fn up_to_half_is_left_out_and_beyond_it_nobody() {
        assert_eq!(ejected(&members(&[true, false, true])), [false, true, false]);
        assert_eq!(ejected(&members(&[true, false, false])), [false, false, false]);
        assert_eq!(ejected(&members(&[false, true])), [true, false]);
        assert_eq!(ejected(&members(&[false])), [false]);
        assert_eq!(ejected(&[]), [false; 0]);
    }

    #[test]
    fn members_that_nobody_reaches_make_way_for_given_addresses() {
        let mut cases = members(&[false, false, false]);
        cases.push(Case { is_well: true, is_spare: true });
        assert_eq!(ejected(&cases), [true, true, true, false]);
        cases[3].is_well = false;
        assert_eq!(ejected(&cases), [false; 4], "nobody is well, so everybody is tried");
    }

    proptest! {
        #[test]
        fn never_more_than_half_and_never_the_well(well in prop::collection::vec(any::<bool>(), 1..20)) {
            let out = ejected(&members(&well));
            let count = out.iter().filter(|out| **out).count();
            prop_assert!(2 * count <= well.len());
            prop_assert!(well.iter().zip(&out).all(|(well, out)| !(*well && *out)));
        }

        #[test]
        fn somebody_can_always_be_used(cases in prop::collection::vec(any::<(bool, bool)>(), 1..20)) {
            let cases: Vec<Case> =
                cases.into_iter().map(|(is_well, is_spare)| Case { is_well, is_spare }).collect();
            prop_assert!(ejected(&cases).iter().any(|out| !out));
        }
    }
}
