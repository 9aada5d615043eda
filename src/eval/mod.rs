//! What came out of a run: held-out measures, their report, the page of a cache, and the charts in both.
//!
//! Nothing here trains or changes a model.

mod area_chart;
mod axis;
pub mod cache_page;
pub mod calibration;
pub mod chart;
pub mod compare;
mod curves;
pub mod held_out;
mod judgement;
mod page;
pub mod report;
mod text_table;
