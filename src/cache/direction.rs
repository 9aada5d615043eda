//! The two directions of the walk of `compact`: the same steps put symbols into a stream or take them from there.

use super::model::{NUMBER_CLASSES, class_of, of_class};
use super::rans::{Decoder, Sink};

/// One direction of the walk.
pub(super) trait Direction {
    const WRITES: bool;
    /// When writing, `symbol` is written and given back; when reading it is ignored.
    fn symbol(&mut self, context: usize, symbol: u8) -> u8;
    fn raw(&mut self, value: u32, bits: u32) -> u32;
    fn overran(&self) -> bool;
    /// Does something with a copy of this direction that is kept in registers, if that is possible, and goes on from where
    /// the copy came to.
    fn as_local<R>(&mut self, something: impl FnOnce(&mut Self) -> R) -> R;

    /// A number by its class.
    #[inline(always)]
    fn number(&mut self, context: usize, value: u32) -> u32 {
        let class = self.symbol(context, class_of(value).0);
        self.rest(class, value)
    }

    /// The rest of a number whose class is known.
    #[inline(always)]
    fn rest(&mut self, class: u8, value: u32) -> u32 {
        let (least, bits) = of_class(class.min(NUMBER_CLASSES - 1));
        if bits == 0 { least } else { least + self.raw(value.wrapping_sub(least), bits) }
    }
}

pub(super) struct Writing<S>(pub S);

impl<S: Sink> Direction for Writing<S> {
    const WRITES: bool = true;
    fn symbol(&mut self, context: usize, symbol: u8) -> u8 {
        self.0.symbol(context, symbol);
        symbol
    }
    fn raw(&mut self, value: u32, bits: u32) -> u32 {
        self.0.raw(value, bits);
        value
    }
    fn overran(&self) -> bool {
        false
    }
    fn as_local<R>(&mut self, something: impl FnOnce(&mut Self) -> R) -> R {
        something(self)
    }
}

pub(super) struct Reading<'a>(pub Decoder<'a>);

impl Direction for Reading<'_> {
    const WRITES: bool = false;
    #[inline(always)]
    fn symbol(&mut self, context: usize, _: u8) -> u8 {
        self.0.symbol(context)
    }
    #[inline(always)]
    fn raw(&mut self, _: u32, bits: u32) -> u32 {
        self.0.raw(bits)
    }
    fn overran(&self) -> bool {
        self.0.overran()
    }
    #[inline(always)]
    fn as_local<R>(&mut self, something: impl FnOnce(&mut Self) -> R) -> R {
        let mut local = Reading(self.0.clone());
        let made = something(&mut local);
        self.0 = local.0;
        made
    }
}
