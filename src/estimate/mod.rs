//! What a teacher's pass over the data will cost on some hardware, before there is any: memory by part, time by a
//! roofline, the bottleneck, and which way of running it is the cheapest that fits.
//!
//! Arithmetic on shapes and published or measured rates; nothing is loaded here, no time is promised, and only
//! [`calibrate`](calibrate()) runs anything. What each number is made of is in docs/planning.md.

pub mod calibrate;
pub mod hardware;
mod link;
pub mod modes;
mod reading;
pub mod report;
pub mod work;

pub use calibrate::{Calibration, calibrate};
pub use hardware::{Hardware, PRESETS, Rates};
pub use modes::{Estimate, Job, Mode, estimates};
pub use report::{Forecast, teacher_text};
pub use work::{TeacherWork, WeightType};
