//! Stored elements as numbers in memory.

use super::{TensorView, WeightsError};
use cairn_spec::DType;

impl TensorView<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.size_bytes()
    }

    /// Copies the elements as f32; exact, since bf16 and f16 are subsets of it.
    ///
    /// # Errors
    ///
    /// [`WeightsError::Conversion`] unless the elements are f32, bf16 or f16.
    pub fn to_f32(&self) -> Result<Vec<f32>, WeightsError> {
        let mut out = vec![0.0; self.elements()];
        self.copy_to_f32(&mut out)?;
        Ok(out)
    }

    /// Copies the elements as f32 into `out`.
    ///
    /// # Errors
    ///
    /// [`WeightsError::Conversion`] unless the elements are f32, bf16 or f16;
    /// [`WeightsError::Elements`] if `out` has another length.
    pub fn copy_to_f32(&self, out: &mut [f32]) -> Result<(), WeightsError> {
        match self.dtype {
            DType::F32 => self.copy(out, f32::from_le_bytes),
            DType::Bf16 => self.copy(out, |bytes| bf16_to_f32(u16::from_le_bytes(bytes))),
            DType::F16 => self.copy(out, |bytes| f16_to_f32(u16::from_le_bytes(bytes))),
            _ => Err(self.no_conversion("f32")),
        }
    }

    /// Copies the elements as bits of bf16.
    ///
    /// # Errors
    ///
    /// [`WeightsError::Conversion`] unless the elements are bf16: rounding is the caller's choice,
    /// made with [`f32_to_bf16`].
    pub fn to_bf16_bits(&self) -> Result<Vec<u16>, WeightsError> {
        if self.dtype != DType::Bf16 {
            return Err(self.no_conversion("bf16"));
        }
        let mut out = vec![0; self.elements()];
        self.copy(&mut out, u16::from_le_bytes)?;
        Ok(out)
    }

    /// Copies the elements as whole numbers.
    ///
    /// # Errors
    ///
    /// [`WeightsError::Conversion`] unless the elements are i64 or i32.
    pub fn to_i64(&self) -> Result<Vec<i64>, WeightsError> {
        let mut out = vec![0; self.elements()];
        match self.dtype {
            DType::I64 => self.copy(&mut out, i64::from_le_bytes)?,
            DType::I32 => self.copy(&mut out, |bytes| i32::from_le_bytes(bytes).into())?,
            _ => return Err(self.no_conversion("i64")),
        }
        Ok(out)
    }

    fn copy<const N: usize, T>(
        &self,
        out: &mut [T],
        convert: impl Fn([u8; N]) -> T,
    ) -> Result<(), WeightsError> {
        let (elements, _) = self.bytes.as_chunks::<N>();
        if elements.len() != out.len() {
            return Err(WeightsError::Elements {
                name: self.name.to_owned(),
                expected: out.len(),
                actual: elements.len(),
            });
        }
        for (out, bytes) in out.iter_mut().zip(elements) {
            *out = convert(*bytes);
        }
        Ok(())
    }

    fn no_conversion(&self, wanted: &'static str) -> WeightsError {
        WeightsError::Conversion { name: self.name.to_owned(), dtype: self.dtype, wanted }
    }
}

/// The f32 with the same value.
pub const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// The nearest bf16, ties to even; a NaN stays one.
pub const fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        // Quieted, so that cutting the low half cannot turn it into an infinity.
        return (bits >> 16) as u16 | 0x40;
    }
    let ties_to_even = 0x7fff + ((bits >> 16) & 1);
    ((bits + ties_to_even) >> 16) as u16
}

/// The f32 with the same value.
pub const fn f16_to_f32(bits: u16) -> f32 {
    let sign = ((bits & 0x8000) as u32) << 16;
    let exponent = ((bits >> 10) & 0x1f) as u32;
    let mantissa = (bits & 0x3ff) as u32;
    let magnitude = match exponent {
        0 => {
            // A subnormal is its mantissa times 2^-24, exactly.
            let value = mantissa as f32 * f32::from_bits((127 - 24) << 23);
            value.to_bits()
        }
        0x1f => 0x7f80_0000 | (mantissa << 13),
        _ => ((exponent + 127 - 15) << 23) | (mantissa << 13),
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_f16_has_its_value() {
        for bits in 0..=u16::MAX {
            let (exponent, mantissa) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
            let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
            let value = f64::from(f16_to_f32(bits));
            match exponent {
                0x1f if mantissa > 0.0 => assert!(value.is_nan()),
                0x1f => assert_eq!(value.to_bits(), (sign * f64::INFINITY).to_bits()),
                0 => assert_eq!(value.to_bits(), (sign * mantissa * 2f64.powi(-24)).to_bits()),
                _ => {
                    let expected = sign * (1.0 + mantissa / 1024.0) * 2f64.powi(exponent - 15);
                    assert_eq!(value.to_bits(), expected.to_bits(), "{bits:#x}");
                }
            }
        }
    }

    #[test]
    fn every_bf16_survives_the_way_through_f32() {
        for bits in 0..=u16::MAX {
            let value = bf16_to_f32(bits);
            if value.is_nan() {
                assert!(bf16_to_f32(f32_to_bf16(value)).is_nan());
            } else {
                assert_eq!(f32_to_bf16(value), bits);
            }
        }
    }

    proptest! {
        #[test]
        fn bf16_is_the_nearest_with_ties_to_even(value in any::<f32>()) {
            let rounded = f32_to_bf16(value);
            let distance = |bits: u16| (f64::from(bf16_to_f32(bits)) - f64::from(value)).abs();
            // Infinity stands for 2^128 when asking what is nearest.
            prop_assume!(value.is_finite() && value.abs() < 3.38e38);
            for other in [rounded.wrapping_sub(1), rounded.wrapping_add(1)] {
                let other_distance = distance(other);
                prop_assert!(
                    other_distance.is_nan() || distance(rounded) < other_distance
                        || (distance(rounded) <= other_distance && rounded & 1 == 0)
                );
            }
        }
    }
}
