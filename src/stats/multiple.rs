//! Several questions at once.

use crate::error::{Error, Result};

/// P values of several questions, adjusted so that the chance of *any* false "yes" stays at alpha: for decisions, where each arm is
/// compared with the baseline. In the order given.
///
/// Holm (1979), "A simple sequentially rejective multiple test procedure".
///
/// # Errors
///
/// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a number that is not from 0 to 1.
///
/// ```
/// let adjusted = lastprice::stats::holm(&[0.25, 0.01, 0.02])?;
/// assert_eq!(adjusted, [0.25, 0.03, 0.04]);
/// # Ok::<(), lastprice::Error>(())
/// ```
pub fn holm(p_values: &[f64]) -> Result<Vec<f64>> {
    let order = ascending(p_values)?;
    let (count, mut least) = (p_values.len(), 0.0f64);
    let mut adjusted = vec![0.0; count];
    for (rank, index) in order.into_iter().enumerate() {
        // An answer is no surer than those before it.
        least = least.max(p_values[index] * (count - rank) as f64).min(1.0);
        adjusted[index] = least;
    }
    Ok(adjusted)
}

/// P values of several questions, adjusted so that of all "yes" a share of alpha is false: for exploring many segments. In the order
/// given.
///
/// Benjamini and Hochberg (1995), "Controlling the false discovery rate"; for questions that are independent or positively dependent.
///
/// # Errors
///
/// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a number that is not from 0 to 1.
///
/// ```
/// let adjusted = lastprice::stats::benjamini_hochberg(&[0.25, 0.01, 0.02])?;
/// assert_eq!(adjusted, [0.25, 0.03, 0.03]);
/// # Ok::<(), lastprice::Error>(())
/// ```
pub fn benjamini_hochberg(p_values: &[f64]) -> Result<Vec<f64>> {
    let order = ascending(p_values)?;
    let (count, mut most) = (p_values.len() as f64, 1.0f64);
    let mut adjusted = vec![0.0; p_values.len()];
    for (rank, index) in order.into_iter().enumerate().rev() {
        most = most.min(p_values[index] * (count / (rank + 1) as f64));
        adjusted[index] = most;
    }
    Ok(adjusted)
}

/// Where the smallest is, the next, and so on.
fn ascending(p_values: &[f64]) -> Result<Vec<usize>> {
    if !p_values.iter().all(|p| (0.0..=1.0).contains(p)) {
        return Err(Error::invalid("p_values", "are not all from 0 to 1"));
    }
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|a, b| p_values[*a].total_cmp(&p_values[*b]));
    Ok(order)
}
