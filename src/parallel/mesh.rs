//! Devices in a grid of four axes, and where each of them stands in it. Arithmetic only.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// How many devices there are along each axis; their product is the number of devices, each of which has a rank.
///
/// Ranks count along `tensor` first, for its devices talk most and should be neighbours, then `expert`, `pipeline` and
/// `data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mesh {
    /// The experts of a layer are divided, and the sequences; tokens go to the experts they chose. Default 1.
    pub expert: usize,
    /// Every matrix is divided, and each device computes a part of each sum. Default 1.
    pub tensor: usize,
    /// The layers are divided; hidden states go from one device to the next. Default 1.
    pub pipeline: usize,
    /// The sequences are divided, and each device has everything else. Default 1.
    pub data: usize,
}

impl Default for Mesh {
    fn default() -> Self {
        Mesh { expert: 1, tensor: 1, pipeline: 1, data: 1 }
    }
}

/// An axis of a mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    Data,
    Pipeline,
    Expert,
    Tensor,
}

/// The coordinates of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    pub data: usize,
    pub pipeline: usize,
    pub expert: usize,
    pub tensor: usize,
}

impl Mesh {
    /// Number of devices.
    pub fn size(&self) -> usize {
        [self.data, self.pipeline, self.expert, self.tensor]
            .into_iter()
            .try_fold(1usize, |product, size| product.checked_mul(size))
            .unwrap_or(usize::MAX)
    }

    /// Devices along an axis.
    pub fn along(&self, axis: Axis) -> usize {
        match axis {
            Axis::Data => self.data,
            Axis::Pipeline => self.pipeline,
            Axis::Expert => self.expert,
            Axis::Tensor => self.tensor,
        }
    }

    /// Every axis with its name in recipes, the slowest first.
    pub fn axes(&self) -> [(&'static str, usize); 4] {
        [("data", self.data), ("pipeline", self.pipeline), ("expert", self.expert), ("tensor", self.tensor)]
    }

    /// Where a rank stands.
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn place(&self, rank: usize) -> Place {
        assert!(rank < self.size(), "rank {rank} of {}", self.size());
        let (rest, tensor) = (rank / self.tensor, rank % self.tensor);
        let (rest, expert) = (rest / self.expert, rest % self.expert);
        Place { data: rest / self.pipeline, pipeline: rest % self.pipeline, expert, tensor }
    }

    /// The rank that stands at a place.
    pub fn rank(&self, place: Place) -> usize {
        ((place.data * self.pipeline + place.pipeline) * self.expert + place.expert) * self.tensor + place.tensor
    }

    /// The ranks that differ from a place along one axis alone, itself among them, in their order.
    pub fn group(&self, place: Place, axis: Axis) -> Vec<usize> {
        (0..self.along(axis)).map(|coordinate| self.rank(place.with(axis, coordinate))).collect()
    }
}

impl Place {
    pub fn along(&self, axis: Axis) -> usize {
        match axis {
            Axis::Data => self.data,
            Axis::Pipeline => self.pipeline,
            Axis::Expert => self.expert,
            Axis::Tensor => self.tensor,
        }
    }

    /// The place with another coordinate along one axis.
    pub fn with(mut self, axis: Axis, coordinate: usize) -> Place {
        match axis {
            Axis::Data => self.data = coordinate,
            Axis::Pipeline => self.pipeline = coordinate,
            Axis::Expert => self.expert = coordinate,
            Axis::Tensor => self.tensor = coordinate,
        }
        self
    }
}

impl fmt::Display for Mesh {
    /// As in `expert 4 x tensor 2`: the axes that have more than one device, the fastest first.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes = [("expert", self.expert), ("tensor", self.tensor), ("pipeline", self.pipeline), ("data", self.data)];
        let named: Vec<String> =
            axes.iter().filter(|(_, size)| *size > 1).map(|(name, size)| format!("{name} {size}")).collect();
        if named.is_empty() { formatter.write_str("one device") } else { formatter.write_str(&named.join(" x ")) }
    }
}

/// What part `index` of `parts` has of `count` things in a row: as equal as it can be.
pub fn share(count: usize, parts: usize, index: usize) -> Range<usize> {
    let at = |index: usize| (count as u128 * index as u128 / parts as u128) as usize;
    at(index)..at(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_one_place_and_tensor_neighbours_follow_each_other() {
        let mesh = Mesh { data: 2, pipeline: 3, expert: 4, tensor: 5 };
        assert_eq!(mesh.size(), 120);
        for rank in 0..mesh.size() {
            assert_eq!(mesh.rank(mesh.place(rank)), rank);
        }
        let place = mesh.place(67);
        assert_eq!(place, Place { data: 1, pipeline: 0, expert: 1, tensor: 2 });
        assert_eq!(mesh.group(place, Axis::Tensor), [65, 66, 67, 68, 69]);
        assert_eq!(mesh.group(place, Axis::Expert), [62, 67, 72, 77]);
        assert_eq!(mesh.group(place, Axis::Pipeline), [67, 87, 107]);
        assert_eq!(mesh.group(place, Axis::Data), [7, 67]);
        assert_eq!(mesh.to_string(), "expert 4 x tensor 5 x pipeline 3 x data 2");
        assert_eq!((Mesh::default().to_string(), Mesh::default().size()), ("one device".into(), 1));
        assert_eq!(Mesh { data: usize::MAX, tensor: 2, ..Mesh::default() }.size(), usize::MAX);
    }

    #[test]
    fn shares_are_all_there_is_in_order_and_differ_by_one_at_most() {
        for (count, parts) in [(0, 3), (2, 3), (7, 3), (12, 4), (5, 1)] {
            let shares: Vec<Range<usize>> = (0..parts).map(|index| share(count, parts, index)).collect();
            assert!(shares.iter().flat_map(|share| share.clone()).eq(0..count));
            let lengths = || shares.iter().map(|share| share.len());
            assert!(lengths().max().unwrap() - lengths().min().unwrap() <= 1);
        }
    }
}
