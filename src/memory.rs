//! Memory of this machine, as the system counts it. Asks, and decides nothing.

use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, System, get_current_pid};

/// Bytes that this process has in memory; 0 where the system does not say.
pub(crate) fn of_this_process() -> u64 {
    let Ok(own) = get_current_pid() else { return 0 };
    let mut system = System::new();
    system.refresh_processes_specifics(
        ProcessesToUpdate::Some(&[own]),
        true,
        ProcessRefreshKind::nothing().with_memory().without_tasks(),
    );
    system.process(own).map_or(0, |process| process.memory())
}

/// Bytes that can be had without taking them from others, within the limits of a container; `None` where the system
/// does not say.
pub(crate) fn free() -> Option<u64> {
    let mut system = System::new();
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    let free = system.available_memory();
    let free = system.cgroup_limits().map_or(free, |limits| free.min(limits.free_memory));
    Some(free).filter(|&bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_takes_memory_and_more_is_free() {
        assert!(of_this_process() > 1 << 20);
        assert!(free().unwrap() > 1 << 20);
    }
}
