//! How fast devices of one process hand bytes to each other.

use std::thread;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::parallel::{Collective, in_process};

/// Bytes that a device hands on at once.
const BYTES: usize = 32 << 20;
const ROUNDS: usize = 8;

/// Bytes per second that one of two devices of this process sends to the other, while that one sends as much.
pub(super) fn link_rate() -> Result<f64> {
    let mut ends = in_process::world(2).into_iter();
    let (Some(first), Some(second)) = (ends.next(), ends.next()) else { unreachable!("a world of two has two ends") };
    let other = thread::Builder::new().name("link".into()).spawn(move || exchange(&second));
    let other = other.map_err(|error| {
        Error::usage(format!("no thread for a second device: {error}"), "allow this program more threads")
    })?;
    let own = exchange(&first);
    other.join().expect("nothing here panics")?;
    own
}

fn exchange(end: &dyn Collective) -> Result<f64> {
    let own = vec![1; BYTES];
    // The first exchange waits for the other thread to start.
    end.all_gather(&own)?;
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        end.all_gather(&own)?;
    }
    Ok((ROUNDS * BYTES) as f64 / begun.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_arrive_no_faster_than_memory_copies_them() {
        let rate = link_rate().unwrap();
        assert!(rate > 1e6 && rate < 1e12, "{rate}");
    }
}
