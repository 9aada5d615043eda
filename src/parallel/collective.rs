//! What ranks say to each other. A transport sends and receives bytes; everything else is made of that here, once, so
//! that every transport adds up in the same order and gives the same bits.

use std::fmt;

use super::message::values;
use crate::error::Result;

/// What a message belongs to. Ranks go through the same operations in the same order; this is how a slip shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    Send = 1,
    AllReduce,
    AllGather,
    AllToAll,
    Broadcast,
    Barrier,
}

impl Operation {
    pub const ALL: [Operation; 6] = [
        Operation::Send,
        Operation::AllReduce,
        Operation::AllGather,
        Operation::AllToAll,
        Operation::Broadcast,
        Operation::Barrier,
    ];

    /// The operation with this number.
    pub fn numbered(number: i32) -> Option<Operation> {
        Operation::ALL.into_iter().find(|operation| *operation as i32 == number)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Operation::Send => "send",
            Operation::AllReduce => "all_reduce",
            Operation::AllGather => "all_gather",
            Operation::AllToAll => "all_to_all",
            Operation::Broadcast => "broadcast",
            Operation::Barrier => "barrier",
        })
    }
}

/// One rank's end of what connects it with others. All of them call the same methods in the same order.
///
/// # Errors
/// Every method that waits for another rank returns [`Error::Rank`](crate::Error::Rank) when a rank failed or is gone.
pub trait Collective {
    /// Number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Sends bytes, and does not wait until they are received. Those to one rank arrive in their order.
    fn post(&self, to: usize, operation: Operation, bytes: Vec<u8>) -> Result<()>;

    /// Waits for the next bytes of a rank.
    fn take(&self, from: usize, operation: Operation) -> Result<Vec<u8>>;

    /// Tells all others that a rank, this one or one it has heard of, cannot go on. What they wait for then ends with an
    /// error.
    fn fail(&self, rank: usize, failure: &str);

    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<()> {
        self.post(to, Operation::Send, bytes)
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        self.take(from, Operation::Send)
    }

    /// Part `n` goes to rank `n`; gives what each rank had for this one, of any lengths.
    fn all_to_all(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        exchange(self, Operation::AllToAll, parts)
    }

    /// What each rank has, in their order.
    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        exchange(self, Operation::AllGather, vec![own.to_vec(); self.size()])
    }

    /// Adds up what the ranks have, element by element, in the order of the ranks: the same bits on all of them.
    fn all_reduce(&self, numbers: &mut [f32]) -> Result<()> {
        let (own, size) = (self.rank(), self.size());
        if size == 1 {
            return Ok(());
        }
        // Each rank adds up a part of the elements and hands out the sums.
        let part = |rank: usize| super::share(numbers.len(), size, rank);
        let parts = (0..size).map(|rank| bytemuck::cast_slice(&numbers[part(rank)]).to_vec()).collect();
        let summands = exchange(self, Operation::AllReduce, parts)?;
        let mut sums: Vec<f32> = values(&summands[0]);
        for summand in &summands[1..] {
            sums.iter_mut().zip(values::<f32>(summand)).for_each(|(sum, value)| *sum += value);
        }
        let sums = exchange(self, Operation::AllReduce, vec![bytemuck::cast_slice(&sums).to_vec(); size])?;
        debug_assert_eq!(sums[own].len() / 4, part(own).len());
        let mut places = numbers.iter_mut();
        for sums in &sums {
            values::<f32>(sums).into_iter().zip(&mut places).for_each(|(sum, place)| *place = sum);
        }
        Ok(())
    }

    /// Gives every rank the bytes of `root`; the others' are not looked at. This alone may be waited for as long as it
    /// takes: it is how ranks are told what to do next.
    fn broadcast(&self, root: usize, bytes: Vec<u8>) -> Result<Vec<u8>> {
        if self.rank() != root {
            return self.take(root, Operation::Broadcast);
        }
        for rank in (0..self.size()).filter(|rank| *rank != root) {
            self.post(rank, Operation::Broadcast, bytes.clone())?;
        }
        Ok(bytes)
    }

    /// Waits until all ranks have come here.
    fn barrier(&self) -> Result<()> {
        exchange(self, Operation::Barrier, vec![vec![]; self.size()]).map(drop)
    }
}

/// Posts a part to each other rank, and takes what they have for this one.
fn exchange<C: Collective + ?Sized>(world: &C, operation: Operation, mut parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
    let (own, size) = (world.rank(), world.size());
    assert_eq!(parts.len(), size, "a part for each rank");
    let mut taken: Vec<Vec<u8>> = (0..size).map(|_| vec![]).collect();
    taken[own] = std::mem::take(&mut parts[own]);
    // Each begins with its neighbour, so that not all of them turn to rank 0 first.
    for step in 1..size {
        let to = (own + step) % size;
        world.post(to, operation, std::mem::take(&mut parts[to]))?;
    }
    for step in 1..size {
        let from = (own + size - step) % size;
        taken[from] = world.take(from, operation)?;
    }
    Ok(taken)
}

/// Some ranks of a world, as a world of their own.
pub struct Group<'a> {
    world: &'a dyn Collective,
    members: Vec<usize>,
    rank: usize,
}

impl<'a> Group<'a> {
    /// # Panics
    /// When the world's rank is not among the members.
    pub fn new(world: &'a dyn Collective, members: Vec<usize>) -> Self {
        let rank = members.iter().position(|&member| member == world.rank());
        Group { world, rank: rank.expect("a rank is a member of its groups"), members }
    }
}

impl Collective for Group<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    fn post(&self, to: usize, operation: Operation, bytes: Vec<u8>) -> Result<()> {
        self.world.post(self.members[to], operation, bytes)
    }

    fn take(&self, from: usize, operation: Operation) -> Result<Vec<u8>> {
        self.world.take(self.members[from], operation)
    }

    fn fail(&self, rank: usize, failure: &str) {
        self.world.fail(rank, failure);
    }
}
