//! Numbers with units, and URLs, as an operator writes them. Every error says
//! what was expected; the key is named by the caller.

use std::time::Duration;

/// Bytes: a bare number, or one with a decimal (`MB`) or binary (`MiB`) unit.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "ki" | "kib" => 1 << 10,
        "mi" | "mib" => 1 << 20,
        "gi" | "gib" => 1 << 30,
        "ti" | "tib" => 1 << 40,
        _ => return Err(format!("{unit:?} is not a unit of size; use B, KiB, MiB, GiB or TiB")),
    };
    scaled(number, factor).ok_or_else(|| format!("{text:?} is not a size; write for example 512MiB or 2GiB"))
}

/// A duration: numbers with units, one after the other (`1h30m`), or a bare
/// number in `bare_unit`.
pub(super) fn duration(text: &str, bare_unit: Duration) -> Result<Duration, String> {
    let bad = || format!("{text:?} is not a duration; write for example 500ms, 30s, 10m or 24h");
    let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).map_err(|_| bad());
    let text = text.trim();
    if text.is_empty() {
        return Err(bad());
    }
    let (number, unit) = split(text);
    if unit.is_empty() {
        return scaled(number, nanos(bare_unit)?).map(Duration::from_nanos).ok_or_else(bad);
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let (number, after) = split(rest);
        if number.is_empty() {
            return Err(bad());
        }
        let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, next) = after.split_at(unit_end);
        let unit = match unit.trim() {
            "ns" => Duration::from_nanos(1),
            "us" | "µs" => Duration::from_micros(1),
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" | "min" => Duration::from_secs(60),
            "h" => Duration::from_secs(3_600),
            "d" => Duration::from_secs(86_400),
            other => return Err(format!("{other:?} is not a unit of time; use ms, s, m, h or d")),
        };
        let part = scaled(number, nanos(unit)?).map(Duration::from_nanos).ok_or_else(bad)?;
        total = total.checked_add(part).ok_or_else(bad)?;
        rest = next;
    }
    Ok(total)
}

/// A count; `_` may separate digits.
pub(super) fn count(text: &str) -> Result<u64, String> {
    let digits = text.trim().replace('_', "");
    digits.parse().map_err(|_| format!("{text:?} is not a whole number"))
}

/// Yes or no, as etcd's flags take it.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "t" | "1" => Ok(true),
        "false" | "f" | "0" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

/// A comma-separated list without empty parts.
pub(super) fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

/// A plain URL with a host and a port and nothing else, normalised.
pub(super) fn url(text: &str) -> Result<Url, String> {
    let text = text.trim();
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(format!("{text:?} is not a URL; write http://HOST:PORT"));
    };
    match scheme {
        "http" => {}
        "https" => return Err(format!("{text}: TLS is not served yet; use http://")),
        "unix" | "unixs" => return Err(format!("{text}: unix sockets are not served; use http://HOST:PORT")),
        _ => return Err(format!("{text}: the scheme {scheme:?} is unknown; use http://")),
    }
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(['/', '?', '#', '@']) {
        return Err(format!("{text}: a URL here has a host and a port and nothing else"));
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(bracketed) => match bracketed.split_once(']') {
            Some((host, port)) => (host, port.strip_prefix(':')),
            None => return Err(format!("{text}: the [ has no ]")),
        },
        None => match authority.rsplit_once(':') {
            Some((host, _)) if host.contains(':') => {
                return Err(format!("{text}: write an IPv6 address in brackets, http://[::1]:PORT"));
            }
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let Some(port) = port.filter(|port| !port.is_empty()) else {
        return Err(format!("{text}: the port is missing; write http://HOST:PORT"));
    };
    if host.is_empty() {
        return Err(format!("{text}: the host is missing; write http://HOST:PORT"));
    }
    let port = port.parse().map_err(|_| format!("{text}: {port:?} is not a port"))?;
    Ok(Url { host: host.to_owned(), port })
}

/// Where something listens or is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    /// A name or an address, without brackets.
    pub host: String,
    /// The port; 0 lets the system choose one.
    pub port: u16,
}

impl Url {
    /// Whether only this machine can reach it.
    pub(super) fn is_loopback(&self) -> bool {
        match self.host.parse::<std::net::IpAddr>() {
            Ok(address) => address.is_loopback(),
            Err(_) => self.host == "localhost",
        }
    }

    /// Whether it stands for every address of the machine.
    pub(super) fn is_wildcard(&self) -> bool {
        self.host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_unspecified())
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "http://[{}]:{}", self.host, self.port),
            false => write!(f, "http://{}:{}", self.host, self.port),
        }
    }
}

/// The number in front and what follows it.
fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

/// `number * factor`, where the number may have a decimal part.
fn scaled(number: &str, factor: u64) -> Option<u64> {
    let number = number.replace('_', "");
    match number.split_once('.') {
        None => number.parse::<u64>().ok()?.checked_mul(factor),
        Some((whole, fraction)) => {
            let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()? };
            let mut value = u128::from(whole) * u128::from(factor);
            let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
            let fraction: u128 = fraction.parse().ok()?;
            value += fraction.checked_mul(u128::from(factor))? / scale;
            u64::try_from(value).ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, expected) in
            [("0", 0), ("1048576", 1 << 20), ("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("8_000kb", 8_000_000)]
        {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "GiB", "2 GX", "-1", "99999999999TiB", "1.2.3MB"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        let ms = Duration::from_millis(1);
        for (text, expected_ms) in
            [("100", 100), ("100ms", 100), ("1.5s", 1_500), ("1h30m", 5_400_000), ("24h", 86_400_000)]
        {
            assert_eq!(duration(text, ms), Ok(Duration::from_millis(expected_ms)), "{text}");
        }
        for text in ["", "s", "5 fortnights", "-5s", "1h30", "999999999999999d"] {
            assert!(duration(text, ms).is_err(), "{text}");
        }
    }

    #[test]
    fn urls() {
        assert_eq!(url("http://10.0.0.1:2379/").unwrap().to_string(), "http://10.0.0.1:2379");
        assert_eq!(url("http://[::1]:0").unwrap(), Url { host: "::1".to_owned(), port: 0 });
        assert!(url("http://localhost:1").unwrap().is_loopback());
        assert!(url("http://0.0.0.0:1").unwrap().is_wildcard());
        for (text, part) in [
            ("https://a:1", "TLS is not served yet"),
            ("http://a", "port is missing"),
            ("http://a:", "port is missing"),
            ("http://:1", "host is missing"),
            ("http://a:b", "not a port"),
            ("http://::1:1", "brackets"),
            ("http://a:1/x", "nothing else"),
            ("a:1", "write http://"),
            ("unix:///x", "unix sockets"),
        ] {
            assert!(url(text).unwrap_err().contains(part), "{text}: {:?}", url(text));
        }
    }
}
