//! Amounts of money: exact decimals with their currency.

use std::fmt;
use std::str::FromStr;

use rust_decimal::Decimal;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// Digits after the decimal point that a price may have.
pub(crate) const MAX_SCALE: u32 = 6;
/// Amounts stay below this, in units of the currency.
pub(crate) const MAX_AMOUNT: i64 = 1_000_000_000_000;

/// An ISO 4217 currency code.
///
/// ```
/// use lastprice::Currency;
///
/// let yen: Currency = "JPY".parse()?;
/// assert_eq!((yen.code(), yen.minor_digits()), ("JPY", 0));
/// assert!("usd".parse::<Currency>().is_err());
/// assert!("ZZZ".parse::<Currency>().is_err());
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Currency([u8; 3]);

impl Currency {
    /// US dollar.
    pub const USD: Currency = Currency(*b"USD");
    /// Euro.
    pub const EUR: Currency = Currency(*b"EUR");
    /// Pound sterling.
    pub const GBP: Currency = Currency(*b"GBP");
    /// Japanese yen.
    pub const JPY: Currency = Currency(*b"JPY");

    /// The currency of a code: three capital letters, on the ISO 4217 list.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `currency`.
    pub fn new(code: &str) -> Result<Self> {
        let wrong = || Error::invalid("currency", "is not an ISO 4217 code (three capital letters)");
        let code: [u8; 3] = code.as_bytes().try_into().map_err(|_| wrong())?;
        minor_digits(code).map(|_| Currency(code)).ok_or_else(wrong)
    }

    /// The three letters.
    #[must_use]
    pub fn code(&self) -> &str {
        std::str::from_utf8(&self.0).expect("only ASCII capitals get in")
    }

    /// How many decimal digits its minor unit has: 2 for USD (cents), 0 for JPY, 3 for KWD.
    #[must_use]
    pub fn minor_digits(&self) -> u32 {
        minor_digits(self.0).unwrap_or(2)
    }

    /// A code that the database holds: three capital letters, whether or not the list (still) has it.
    pub(crate) fn stored(code: &str) -> Result<Self> {
        match <[u8; 3]>::try_from(code.as_bytes()) {
            Ok(letters) if letters.iter().all(u8::is_ascii_uppercase) => Ok(Currency(letters)),
            _ => Err(Error::internal("a stored currency is not three capital letters")),
        }
    }
}

impl FromStr for Currency {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Currency::new(s)
    }
}

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.code())
    }
}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

impl Serialize for Currency {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.code())
    }
}

impl<'de> Deserialize<'de> for Currency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let code = String::deserialize(deserializer)?;
        Currency::new(&code).map_err(serde::de::Error::custom)
    }
}

/// An exact amount in one currency.
///
/// Amounts of equal value are equal, however they are written: 19.9 and 19.90. Nothing here adds two
/// currencies, or rounds.
///
/// ```
/// use lastprice::Money;
///
/// let price = Money::from_minor(1999, "USD".parse()?);
/// assert_eq!(price.to_string(), "19.99 USD");
/// assert_eq!(Money::new("19.9", "USD")?, Money::new("19.90", "USD")?);
/// assert!(Money::new("19.9", "USD")? != Money::new("19.9", "EUR")?);
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Money {
    amount: Decimal,
    currency: Currency,
}

impl Money {
    /// An amount written as a decimal, such as `"19.90"`, with a currency code.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `amount` or `currency`: not a decimal (`NaN` is
    /// none), more than 6 digits after the point, or 10¹² and more.
    pub fn new(amount: &str, currency: &str) -> Result<Self> {
        let currency = currency.parse()?;
        let amount = decimal(amount)
            .ok_or_else(|| Error::invalid("amount", "is not a decimal number such as 19.90"))?;
        Money::of(amount, currency)
    }

    /// An amount that is a [`Decimal`] already.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `amount`: more than 6 digits after the point,
    /// or 10¹² and more.
    pub fn of(amount: Decimal, currency: Currency) -> Result<Self> {
        Ok(Money { amount: Money::checked(amount)?, currency })
    }

    /// What an amount in any currency must be.
    pub(crate) fn checked(amount: Decimal) -> Result<Decimal> {
        // 0.10000000 says no more than 0.1, and -0 no more than 0.
        let mut amount = if amount.scale() > MAX_SCALE { amount.normalize() } else { amount };
        if amount.is_zero() {
            amount.set_sign_positive(true);
        }
        if amount.scale() > MAX_SCALE {
            return Err(Error::invalid(
                "amount",
                format_args!("has more than {MAX_SCALE} digits after the point"),
            ));
        }
        if amount.abs() >= Decimal::from(MAX_AMOUNT) {
            return Err(Error::invalid("amount", "is 10^12 or more"));
        }
        Ok(amount)
    }

    /// An amount in minor units (cents, for USD), as payment providers report it.
    #[must_use]
    pub fn from_minor(minor: i64, currency: Currency) -> Self {
        Money { amount: Decimal::new(minor, currency.minor_digits()), currency }
    }

    /// The amount in minor units (cents, for USD), as payment providers take it; `None` if it is not a whole number of
    /// them.
    ///
    /// ```
    /// # use lastprice::Money;
    /// assert_eq!(Money::new("19.90", "USD")?.minor(), Some(1990));
    /// assert_eq!(Money::new("19.999", "USD")?.minor(), None);
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    #[must_use]
    pub fn minor(&self) -> Option<i64> {
        let minor = self.amount.checked_mul(Decimal::from(10u64.pow(self.currency.minor_digits())))?;
        if minor.fract().is_zero() { i64::try_from(minor.trunc()).ok() } else { None }
    }

    /// An amount computed by the database: a sum may be larger than any single amount.
    pub(crate) fn stored(amount: Decimal, currency: Currency) -> Self {
        Money { amount, currency }
    }

    /// Nothing, in a currency.
    #[must_use]
    pub fn zero(currency: Currency) -> Self {
        Money { amount: Decimal::ZERO, currency }
    }

    /// This many times the amount.
    ///
    /// ```
    /// # use lastprice::Money;
    /// let seats = Money::new("19.90", "USD")?.checked_mul(3)?;
    /// assert_eq!(seats, Money::new("59.70", "USD")?);
    /// assert_eq!(seats.checked_sub(Money::new("5", "USD")?)?, Money::new("54.70", "USD")?);
    /// assert!(seats.checked_sub(Money::new("5", "EUR")?).is_err());
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `amount`: the result is 10¹² or more.
    pub fn checked_mul(self, times: u32) -> Result<Self> {
        Money::result(self.amount.checked_mul(times.into()), self.currency)
    }

    /// The sum.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `currency` if the currencies differ, or `amount` if the result
    /// is 10¹² or more.
    pub fn checked_add(self, other: Money) -> Result<Self> {
        self.same_currency(other)?;
        Money::result(self.amount.checked_add(other.amount), self.currency)
    }

    /// The difference.
    ///
    /// # Errors
    ///
    /// As [`checked_add`](Money::checked_add).
    pub fn checked_sub(self, other: Money) -> Result<Self> {
        self.same_currency(other)?;
        Money::result(self.amount.checked_sub(other.amount), self.currency)
    }

    fn same_currency(self, other: Money) -> Result<()> {
        if self.currency != other.currency {
            return Err(Error::invalid("currency", "is not the same one"));
        }
        Ok(())
    }

    fn result(amount: Option<Decimal>, currency: Currency) -> Result<Self> {
        Money::of(amount.ok_or_else(|| Error::invalid("amount", "is 10^12 or more"))?, currency)
    }

    /// The amount, in units of the currency.
    #[must_use]
    pub fn amount(&self) -> Decimal {
        self.amount
    }

    /// The currency.
    #[must_use]
    pub fn currency(&self) -> Currency {
        self.currency
    }
}

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.amount, self.currency)
    }
}

impl fmt::Debug for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Digits, with a point and a sign at most, read without rounding.
pub(crate) fn decimal(text: &str) -> Option<Decimal> {
    let plain = |c: char| c.is_ascii_digit() || c == '.' || c == '-';
    text.chars().all(plain).then(|| Decimal::from_str_exact(text).ok()).flatten()
}

/// ISO 4217 (list one, 2024-06, without funds codes and precious metals): digits of the minor unit.
fn minor_digits(code: [u8; 3]) -> Option<u32> {
    const ZERO: &[u8] = b"BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF";
    const THREE: &[u8] = b"BHD IQD JOD KWD LYD OMR TND";
    const FOUR: &[u8] = b"CLF UYW";
    const TWO: &[u8] = b"AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BRL BSD BTN BWP BYN \
        BZD CAD CDF CHF CNY COP CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD \
        HNL HTG HUF IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU \
        MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK \
        SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD XCG YER \
        ZAR ZMW ZWG";
    let is_in = |list: &[u8]| list.split(u8::is_ascii_whitespace).any(|c| c == code);
    [(TWO, 2), (ZERO, 0), (THREE, 3), (FOUR, 4)]
        .into_iter()
        .find(|(list, _)| is_in(list))
        .map(|(_, digits)| digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minor_units() {
        for (minor, code, text) in [
            (1999, "USD", "19.99"),
            (500, "JPY", "500"),
            (1234, "KWD", "1.234"),
            (-5, "EUR", "-0.05"),
            (7, "CLF", "0.0007"),
        ] {
            assert_eq!(Money::from_minor(minor, code.parse().unwrap()).amount().to_string(), text);
        }
    }

    #[test]
    fn refuses_what_is_no_amount() {
        for bad in [
            "NaN",
            "",
            "1e5",
            "abc",
            "1,5",
            "Infinity",
            "0.1234567",
            "1000000000000",
            "99999999999999999999999999999999",
        ] {
            assert_eq!(Money::new(bad, "USD").unwrap_err().field(), Some("amount"), "{bad}");
        }
        for bad in ["", "US", "usd", "USDT", "ZZZ", "U$D", "ÜSD"] {
            assert_eq!(Money::new("1", bad).unwrap_err().field(), Some("currency"), "{bad}");
        }
        assert_eq!(Money::new("0.10000000", "USD").unwrap().amount().to_string(), "0.1");
        assert_eq!(Money::new("-0.00", "USD").unwrap().amount().to_string(), "0.00");
    }
}
