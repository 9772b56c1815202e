//! Products by AMX tiles (Intel, Sapphire Rapids and later): two by two tiles of 16 x 16 sums.

use super::Part;

#[cfg(not(target_arch = "x86_64"))]
mod without {
    pub(crate) fn available() -> bool {
        false
    }

    #[derive(Debug)]
    pub(crate) struct Tiles(());

    impl Tiles {
        pub(crate) fn take() -> Self {
            unreachable!("the path was not detected")
        }
    }

    pub(crate) fn part(_: &[crate::element::Bf16], _: usize, _: [&[u32]; 2], _: usize, _: usize, _: &mut super::Part) {
        unreachable!("the path was not detected");
    }
}
#[cfg(not(target_arch = "x86_64"))]
pub(super) use without::{Tiles, available, part};

#[cfg(target_arch = "x86_64")]
pub(super) use with::{Tiles, available, part};

#[cfg(target_arch = "x86_64")]
mod with {
    use super::Part;
    use crate::element::Bf16;
    use crate::low::{BLOCK, Columns, K_BLOCK};
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;
    use std::cell::Cell;
    use std::marker::PhantomData;
    use std::sync::OnceLock;

    /// Shapes of the eight tiles: 16 rows of 64 bytes each.
    #[repr(C, align(64))]
    struct Shapes {
        palette: u8,
        start: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }

    static SHAPES: Shapes = {
        let mut shapes = Shapes { palette: 1, start: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        let mut tile = 0;
        while tile < 8 {
            (shapes.bytes[tile], shapes.rows[tile]) = (64, 16);
            tile += 1;
        }
        shapes
    };

    /// Whether the CPU has tiles of BF16 and the kernel lets this process use them.
    pub(crate) fn available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            // CPUID leaf 7: bit 22 of edx is AMX-BF16, bit 24 the tiles.
            let features = __cpuid_count(7, 0).edx;
            features & (1 << 22) != 0 && features & (1 << 24) != 0 && may_use_tiles()
        })
    }

    /// Asks Linux for the tiles' state (ARCH_REQ_XCOMP_PERM of feature 18), for all threads to come and this one.
    #[cfg(target_os = "linux")]
    fn may_use_tiles() -> bool {
        let result: i64;
        // SAFETY: arch_prctl with this request changes nothing but a permission of this process; the
        // registers that a system call writes are named.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") 158i64 => result,
                in("rdi") 0x1023, in("rsi") 18,
                lateout("rcx") _, lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    #[cfg(not(target_os = "linux"))]
    fn may_use_tiles() -> bool {
        false
    }

    thread_local! {
        static HELD: Cell<bool> = const { Cell::new(false) };
    }

    /// Tiles in use by this thread, given back at the end. They are the thread's, which has them once.
    #[derive(Debug)]
    pub(crate) struct Tiles(PhantomData<*const ()>);

    impl Tiles {
        /// Takes them.
        pub(crate) fn take() -> Self {
            assert!(available(), "the path was detected");
            assert!(!HELD.replace(true), "a thread's tiles are held once");
            // SAFETY: the CPU has tiles and the kernel lets this process use them.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, readonly)) };
            Self(PhantomData)
        }
    }

    impl Drop for Tiles {
        fn drop(&mut self) {
            // SAFETY: as above.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
            HELD.set(false);
        }
    }

    /// See [`super::super::Path::part`]. Whoever calls it holds [`Tiles`].
    pub(crate) fn part(a: &[Bf16], stride: usize, b: [&[u32]; 2], from: usize, to: usize, out: &mut Part) {
        debug_assert!(available());
        // SAFETY: the caller has checked that 32 rows of `a` and both panels of `b` reach to block `to`; the
        // tiles are there and have their shapes, and nothing else uses them.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {blocks}, {blocks}",
                "jz 3f",
                "2:",
                "tileloadd tmm4, [{a0} + {stride}]",
                "tileloadd tmm6, [{b0} + {row}]",
                "tileloadd tmm7, [{b1} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {stride}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 64",
                "add {a1}, 64",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {blocks}",
                "jnz 2b",
                "3:",
                "tilestored [{out} + {out_row}], tmm0",
                "tilestored [{out} + {out_row} + 64], tmm1",
                "add {out}, 2048",
                "tilestored [{out} + {out_row}], tmm2",
                "tilestored [{out} + {out_row} + 64], tmm3",
                a0 = inout(reg) a.as_ptr().add(from * K_BLOCK) => _,
                a1 = inout(reg) a.as_ptr().add(16 * stride + from * K_BLOCK) => _,
                stride = in(reg) 2 * stride,
                b0 = inout(reg) b[0].as_ptr().add(from * Columns::TILE) => _,
                b1 = inout(reg) b[1].as_ptr().add(from * Columns::TILE) => _,
                row = in(reg) 64usize,
                blocks = inout(reg) to.saturating_sub(from) => _,
                out = inout(reg) out.as_mut_ptr() => _,
                out_row = in(reg) 4 * BLOCK,
                options(nostack),
            );
        }
    }
}
