//! A server of files over HTTP that gives ranges, and fails when told to. Listens on this machine alone, and ends with the
//! test.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Where the files are, as a web page's and as a bucket's.
const FOLDER: &str = "/caches/one/";

/// What goes wrong with one answer to a GET.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    Status(u16),
    /// The connection ends after so many bytes of the body.
    Dropped(usize),
    /// The body has so few bytes, and says so.
    Short(usize),
    /// The whole file comes in place of a range.
    Whole,
    /// One bit is wrong at this byte of the file, or at the last that is sent if it is not among them.
    Flipped(u64),
    FlippedLast,
    /// The body comes only after this time.
    Slow(Duration),
}

#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub range: Option<Range<u64>>,
}

pub struct RangeServer {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    files: BTreeMap<String, Vec<u8>>,
    /// Whether answers have the tags by which a client goes on in the middle.
    tags: bool,
    /// What goes wrong next, with the beginning of the names it is for.
    faults: Mutex<Vec<(String, Fault)>>,
    requests: Mutex<Vec<Request>>,
    sent: AtomicU64,
    stopped: AtomicBool,
}

impl RangeServer {
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> RangeServer {
        RangeServer::serve(files, false)
    }

    pub fn start_with_tags(files: BTreeMap<String, Vec<u8>>) -> RangeServer {
        RangeServer::serve(files, true)
    }

    fn serve(files: BTreeMap<String, Vec<u8>>, tags: bool) -> RangeServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            files,
            tags,
            faults: Mutex::default(),
            requests: Mutex::default(),
            sent: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        });
        let serving = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (stream, shared) = (stream.unwrap(), serving.clone());
                // A client that hangs up is no failure of the server.
                thread::spawn(move || drop(shared.converse(stream)));
            }
        });
        RangeServer { address, shared }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    /// Makes the next answers of files whose names begin so go wrong.
    pub fn fail<const N: usize>(&self, name: &str, faults: [Fault; N]) {
        let mut waiting = self.shared.faults.lock().unwrap();
        waiting.extend(faults.map(|fault| (name.to_string(), fault)));
    }

    pub fn faults_left(&self) -> usize {
        self.shared.faults.lock().unwrap().len()
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// Bytes of bodies.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }
}

impl Drop for RangeServer {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        // Wakes the listener.
        let _ = TcpStream::connect(&self.address);
    }
}

impl Shared {
    /// Answers request after request, until the client hangs up or the answer is that.
    fn converse(&self, stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let (mut reader, mut writer) = (BufReader::new(stream.try_clone()?), stream);
        loop {
            let mut head = Vec::new();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                if line.trim_end().is_empty() {
                    break;
                }
                head.push(line.trim_end().to_string());
            }
            let mut words = head[0].split(' ');
            let (method, path) = (words.next().unwrap().to_string(), words.next().unwrap().to_string());
            let header = |name: &str| {
                let named =
                    |line: &&String| line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name));
                head[1..].iter().find(named).map(|line| line.split_once(':').unwrap().1.trim().to_string())
            };
            let range = header("range").map(|range| {
                let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                first.parse::<u64>().unwrap()..last.parse::<u64>().unwrap() + 1
            });
            self.requests.lock().unwrap().push(Request { method: method.clone(), range: range.clone() });
            if !self.answer(&mut writer, &method, &path, range)? {
                return Ok(());
            }
        }
    }

    /// Whether the connection goes on.
    fn answer(
        &self,
        writer: &mut TcpStream,
        method: &str,
        path: &str,
        range: Option<Range<u64>>,
    ) -> std::io::Result<bool> {
        let name = path.strip_prefix(FOLDER).unwrap_or("");
        let Some(file) = self.files.get(name) else {
            write!(writer, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            return Ok(true);
        };
        let fault = match method {
            "GET" => {
                let mut faults = self.faults.lock().unwrap();
                let place = faults.iter().position(|(beginning, _)| name.starts_with(beginning.as_str()));
                place.map(|place| faults.remove(place).1)
            }
            _ => None,
        };
        if let Some(Fault::Status(status)) = fault {
            let page = "<html>\n<h1>This did not work.</h1>\n</html>\n";
            write!(writer, "HTTP/1.1 {status} Failed\r\nContent-Length: {}\r\n\r\n{page}", page.len())?;
            return Ok(true);
        }
        let range = if matches!(fault, Some(Fault::Whole)) { None } else { range };
        let mut headers = String::new();
        let status = match &range {
            Some(range) => {
                headers += &format!("Content-Range: bytes {}-{}/{}\r\n", range.start, range.end - 1, file.len());
                "206 Partial Content"
            }
            None => "200 OK",
        };
        let range = range.unwrap_or(0..file.len() as u64);
        let mut body = file[range.start as usize..range.end as usize].to_vec();
        match fault {
            Some(Fault::Short(most)) => body.truncate(most),
            Some(Fault::Flipped(place)) if range.contains(&place) => body[(place - range.start) as usize] ^= 4,
            Some(Fault::Flipped(_) | Fault::FlippedLast) => *body.last_mut().unwrap() ^= 4,
            _ => {}
        }
        if self.tags {
            headers += "ETag: \"one\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n";
        }
        let length = body.len();
        write!(writer, "HTTP/1.1 {status}\r\nAccept-Ranges: bytes\r\n{headers}Content-Length: {length}\r\n\r\n")?;
        if method == "HEAD" {
            return Ok(true);
        }
        match fault {
            Some(Fault::Dropped(after)) => {
                writer.write_all(&body[..after.min(length - 1)])?;
                return Ok(false);
            }
            Some(Fault::Slow(time)) => thread::sleep(time),
            _ => {}
        }
        self.sent.fetch_add(length as u64, Ordering::Relaxed);
        writer.write_all(&body)?;
        Ok(true)
    }
}
