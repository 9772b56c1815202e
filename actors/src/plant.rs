//! Bugs that the simulator can plant in the cores, to prove that it would find them.
//! Nothing but the simulator ever plants one.

use std::fmt;
use std::str::FromStr;

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Messages of and to replaced actors are taken.
    FenceSkipped,
    /// A second copy of a sum is counted.
    ContributionTwice,
    /// A commit is announced before its record is synced.
    AcknowledgedBeforeSynced,
    /// Lanes are added in the order in which they came.
    ArrivalOrderSum,
    /// An expert computes rows again that it has computed.
    ComputedTwice,
    /// A session forgets what was not acknowledged when its link breaks.
    LostAtReconnect,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::FenceSkipped,
        Self::ContributionTwice,
        Self::AcknowledgedBeforeSynced,
        Self::ArrivalOrderSum,
        Self::ComputedTwice,
        Self::LostAtReconnect,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::FenceSkipped => "fence-skipped",
            Self::ContributionTwice => "contribution-twice",
            Self::AcknowledgedBeforeSynced => "acknowledged-before-synced",
            Self::ArrivalOrderSum => "arrival-order-sum",
            Self::ComputedTwice => "computed-twice",
            Self::LostAtReconnect => "lost-at-reconnect",
        }
    }
}

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Bug {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|b| b.name() == text).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|b| b.name()).collect();
            format!("no bug is called '{text}'; there are {}", names.join(", "))
        })
    }
}
