//! A GET of a small page over plain HTTP, for what only a node's HTTP side
//! tells: its clock and its metrics. Bounded in time and size.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// An answer larger than this is cut off.
const RESPONSE_BYTES_MAX: u64 = 4 << 20;

/// What came back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The server's clock in ms since 1970 (a whole second), if it said.
    pub date_ms: Option<u64>,
    /// The body; cut off at 4 MiB.
    pub body: String,
}

/// Gets `http://host:port` + `path`. `None` for anything that is no answer in time.
pub async fn get(endpoint: &str, path: &str, limit: Duration) -> Option<Response> {
    let authority = endpoint.strip_prefix("http://").unwrap_or(endpoint);
    let fetch = async {
        let mut stream = TcpStream::connect(authority).await.ok()?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut bytes = Vec::new();
        stream.take(RESPONSE_BYTES_MAX).read_to_end(&mut bytes).await.ok()?;
        parse(&String::from_utf8_lossy(&bytes))
    };
    timeout(limit, fetch).await.ok().flatten()
}

fn parse(text: &str) -> Option<Response> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.split_whitespace().nth(1)?.parse().ok()?;
    let date = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("date"))
        .and_then(|(_, value)| parse_date(value.trim()));
    Some(Response { status, date_ms: date, body: body.to_owned() })
}

/// `Fri, 20 Nov 2026 11:05:09 GMT` as ms since 1970.
fn parse_date(text: &str) -> Option<u64> {
    let mut parts = text.split_once(", ")?.1.split(' ');
    let day: u64 = parts.next()?.parse().ok()?;
    let month_name = parts.next()?;
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let month = months.iter().position(|name| *name == month_name)? as u64;
    let year: u64 = parts.next()?.parse().ok()?;
    let mut clock = parts.next()?.split(':');
    let mut next = || clock.next()?.parse::<u64>().ok();
    let (hour, minute, second) = (next()?, next()?, next()?);
    if parts.next() != Some("GMT") || !(1970..10_000).contains(&year) || !(1..=31).contains(&day) {
        return None;
    }
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize];
    let leap_days = (1970..year).filter(|year| is_leap(*year)).count() as u64;
    let this_leap_day = u64::from(is_leap(year) && month >= 2);
    let days = (year - 1970) * 365 + leap_days + before + this_leap_day + day - 1;
    Some((((days * 24 + hour) * 60 + minute) * 60 + second) * 1000)
}

/// The value of a metric without labels in a page of Prometheus' text format.
pub fn metric(page: &str, name: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.split(' ').next()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_apart() {
        let text = "HTTP/1.1 200 OK\r\ndate: Fri, 20 Nov 2026 11:05:09 GMT\r\nX: y\r\n\r\nbody\r\n\r\nrest";
        let response = parse(text).unwrap();
        assert_eq!(response.status, 200);
        assert_eq!(response.date_ms, Some(1_795_172_709_000));
        assert_eq!(response.body, "body\r\n\r\nrest");
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn dates_are_gmt() {
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(parse_date("Thu, 29 Feb 2024 23:59:59 GMT"), Some(1_709_251_199_000));
        assert_eq!(parse_date("Fri, 01 Mar 2024 00:00:00 GMT"), Some(1_709_251_200_000));
        assert_eq!(parse_date("Thu, 01 Foo 1970 00:00:00 GMT"), None);
        assert_eq!(parse_date("yesterday"), None);
    }

    #[test]
    fn metrics_are_found_by_their_whole_name() {
        let page = "# HELP a b\na_total 3\na 4.5\nb{x=\"y\"} 6\n";
        assert_eq!(metric(page, "a"), Some(4.5));
        assert_eq!(metric(page, "b"), None);
    }
}
