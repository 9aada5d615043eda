//! What came out of a run: held-out measures, their report, and the charts in it.
//!
//! Nothing here trains or changes a model.

mod area_chart;
mod axis;
pub mod chart;
pub mod held_out;
mod page;
pub mod report;
