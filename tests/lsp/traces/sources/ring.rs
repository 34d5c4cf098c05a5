//! A bounded ring buffer for one producer and one consumer, without locks and without allocation after `new`.

use std::cell::UnsafeCell;
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// Keeps a value on a cache line of its own, so that producer and consumer do not slow each other down.
#[repr(align(64))]
struct Padded<T>(T);

struct Ring<T> {
    slots: Box<[UnsafeCell<MaybeUninit<T>>]>,
    head: Padded<AtomicUsize>,
    tail: Padded<AtomicUsize>,
}

// SAFETY: a slot is written by the producer before `tail` passes it and read by the consumer after.
unsafe impl<T: Send> Sync for Ring<T> {}
unsafe impl<T: Send> Send for Ring<T> {}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushError<T> {
    Full(T),
    Disconnected(T),
}

impl<T> fmt::Display for PushError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PushError::Full(_) => write!(f, "the ring is full"),
            PushError::Disconnected(_) => write!(f, "the consumer is gone"),
        }
    }
}

pub struct Producer<T> {
    ring: Arc<Ring<T>>,
    cached_head: usize,
}

pub struct Consumer<T> {
    ring: Arc<Ring<T>>,
    cached_tail: usize,
}

/// Makes a ring of `capacity` slots, rounded up to a power of two.
pub fn ring<T>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    assert!(capacity > 0, "a ring needs at least one slot");
    let capacity = capacity.next_power_of_two();
    let slots = (0..capacity)
        .map(|_| UnsafeCell::new(MaybeUninit::uninit()))
        .collect::<Vec<_>>()
        .into_boxed_slice();
    let ring = Arc::new(Ring {
        slots,
        head: Padded(AtomicUsize::new(0)),
        tail: Padded(AtomicUsize::new(0)),
    });
    let producer = Producer { ring: Arc::clone(&ring), cached_head: 0 };
    let consumer = Consumer { ring, cached_tail: 0 };
    (producer, consumer)
}

impl<T> Ring<T> {
    #[inline]
    fn mask(&self) -> usize {
        self.slots.len() - 1
    }

    #[inline]
    fn slot(&self, index: usize) -> *mut MaybeUninit<T> {
        self.slots[index & self.mask()].get()
    }
}

impl<T> Producer<T> {
    /// Puts `value` in the ring, or gives it back when there is no room.
    pub fn push(&mut self, value: T) -> Result<(), PushError<T>> {
        let tail = self.ring.tail.0.load(Ordering::Relaxed);
        if tail.wrapping_sub(self.cached_head) == self.ring.slots.len() {
            self.cached_head = self.ring.head.0.load(Ordering::Acquire);
            if tail.wrapping_sub(self.cached_head) == self.ring.slots.len() {
                return Err(if Arc::strong_count(&self.ring) == 1 {
                    PushError::Disconnected(value)
                } else {
                    PushError::Full(value)
                });
            }
        }
        // SAFETY: the slot is free: the consumer's head has passed it.
        unsafe { (*self.ring.slot(tail)).write(value) };
        self.ring.tail.0.store(tail.wrapping_add(1), Ordering::Release);
        Ok(())
    }

    pub fn len(&self) -> usize {
        let tail = self.ring.tail.0.load(Ordering::Relaxed);
        tail.wrapping_sub(self.ring.head.0.load(Ordering::Acquire))
    }
}

impl<T> Consumer<T> {
    /// Takes the oldest value, if there is one.
    pub fn pop(&mut self) -> Option<T> {
        let head = self.ring.head.0.load(Ordering::Relaxed);
        if head == self.cached_tail {
            self.cached_tail = self.ring.tail.0.load(Ordering::Acquire);
            if head == self.cached_tail {
                return None;
            }
        }
        // SAFETY: the slot was written before the producer's tail passed it.
        let value = unsafe { (*self.ring.slot(head)).assume_init_read() };
        self.ring.head.0.store(head.wrapping_add(1), Ordering::Release);
        Some(value)
    }

}
