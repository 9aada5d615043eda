//! When the next request may begin, and which server gets it: the one with the least to do among those that are not left
//! in peace after a failure. Requests begin no faster than the recipe allows.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How soon a waiting thread sees that it is to stop.
pub(super) const GLANCE: Duration = Duration::from_millis(50);

/// Shared by all threads.
pub(super) struct Pace {
    /// Between the beginnings of two requests.
    interval: Duration,
    state: Mutex<State>,
}

struct State {
    next_start: Instant,
    servers: Vec<Server>,
}

#[derive(Clone, Copy)]
struct Server {
    under_way: usize,
    /// All that it was ever given: of servers with as little to do, the one that had the least is next.
    given: u64,
    rests_until: Instant,
}

impl Pace {
    pub fn new(servers: usize, requests_per_second: Option<f64>) -> Pace {
        let now = Instant::now();
        let interval = requests_per_second.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(1.0 / rate));
        let servers = vec![Server { under_way: 0, given: 0, rests_until: now }; servers];
        Pace { interval, state: Mutex::new(State { next_start: now, servers }) }
    }

    /// Waits for a turn, and gives the number of the server to ask; `None` when `stop` is set before.
    pub fn turn(&self, stop: &AtomicBool) -> Option<usize> {
        loop {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            let wait = {
                let mut state = self.state.lock().expect("no thread panics with the lock");
                let now = Instant::now();
                let ready = (0..state.servers.len()).filter(|&number| state.servers[number].rests_until <= now);
                match ready.min_by_key(|&number| (state.servers[number].under_way, state.servers[number].given, number))
                {
                    Some(number) if state.next_start <= now => {
                        state.next_start = now + self.interval;
                        state.servers[number].under_way += 1;
                        state.servers[number].given += 1;
                        return Some(number);
                    }
                    Some(_) => state.next_start - now,
                    None => state.servers.iter().map(|server| server.rests_until).min()? - now,
                }
            };
            std::thread::sleep(wait.min(GLANCE));
        }
    }

    /// A request has ended; after a failure the server is not asked again for a while.
    pub fn ended(&self, server: usize, rest: Option<Duration>) {
        let mut state = self.state.lock().expect("no thread panics with the lock");
        let server = &mut state.servers[server];
        server.under_way -= 1;
        if let Some(rest) = rest {
            server.rests_until = server.rests_until.max(Instant::now() + rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_goes_to_the_server_with_the_least_and_none_that_rests() {
        let (pace, stop) = (Pace::new(3, None), AtomicBool::new(false));
        assert_eq!(
            (pace.turn(&stop), pace.turn(&stop), pace.turn(&stop), pace.turn(&stop)),
            (Some(0), Some(1), Some(2), Some(0))
        );
        pace.ended(2, None);
        assert_eq!(pace.turn(&stop), Some(2));
        pace.ended(1, Some(Duration::from_secs(600)));
        assert_eq!((pace.turn(&stop), pace.turn(&stop)), (Some(2), Some(0)));
    }

    #[test]
    fn servers_that_are_never_busy_take_turns() {
        let (pace, stop) = (Pace::new(2, None), AtomicBool::new(false));
        let one = || {
            let server = pace.turn(&stop);
            pace.ended(server.unwrap(), None);
            server
        };
        assert_eq!([one(), one(), one(), one()], [Some(0), Some(1), Some(0), Some(1)]);
    }

    #[test]
    fn a_waiting_thread_sees_that_it_is_to_stop() {
        let (pace, stop) = (Pace::new(1, None), AtomicBool::new(false));
        pace.turn(&stop);
        pace.ended(0, Some(Duration::from_secs(600)));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pace.turn(&stop));
            stop.store(true, Ordering::Relaxed);
            assert_eq!(waiting.join().unwrap(), None);
        });
    }

    #[test]
    fn requests_begin_no_faster_than_they_may() {
        let (pace, stop, began) = (Pace::new(1, Some(50.0)), AtomicBool::new(false), Instant::now());
        for _ in 0..6 {
            pace.turn(&stop);
        }
        assert!(began.elapsed() >= Duration::from_millis(100), "{:?}", began.elapsed());
    }
}
