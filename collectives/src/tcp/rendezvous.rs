//! How the ranks find each other. Each opens a port of its own and tells rank 0, which sends everyone the list of all; then
//! every rank connects to those below it and is connected to by those above. What rank 0 was told through stays their
//! connection.
//!
//! Greetings are lines of text: `lasp TOKEN RANK SIZE PORT`, and what rank 0 answers, `lasp TOKEN ok` or why not.

use super::Options;
use crate::{Error, Result};
use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};

/// Ports that rank 0 may take, from the one named on: another program, such as torchrun's own store, may have the first.
const PORTS: u16 = 16;
const LONGEST_LINE: usize = 1 << 20;
/// For an answer from what may be another program.
const ANSWER: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);

/// Gives the connection with each rank, none for this one.
pub(super) fn meet(options: &Options) -> Result<Vec<Option<TcpStream>>> {
    let job = Job { options, deadline: Instant::now() + options.timeout };
    if options.size == 0 || options.rank >= options.size {
        return Err(job.error(format!("its rank must be one of 0 to {}", options.size.saturating_sub(1))));
    }
    match (options.size, options.rank) {
        (1, _) => Ok(vec![None]),
        (_, 0) => job.gather(),
        _ => job.enter(),
    }
}

struct Job<'a> {
    options: &'a Options,
    deadline: Instant,
}

struct Greeting {
    rank: usize,
    size: usize,
    port: u16,
}

impl Job<'_> {
    fn error(&self, problem: String) -> Error {
        let Options { rank, size, address, port, .. } = self.options;
        Error::Join { rank: *rank, size: *size, at: format!("{address}:{port}"), problem }
    }

    fn failed(&self, what: &str) -> impl Fn(io::Error) -> Error {
        move |error| self.error(format!("{what}: {error}"))
    }

    fn late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    /// Rank 0: listens until all have come, then sends each the list.
    fn gather(&self) -> Result<Vec<Option<TcpStream>>> {
        let Options { size, port, token, .. } = self.options;
        let any = match self.resolve()?.first() {
            Some(address) if address.is_ipv6() => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        let ports = *port..=port.saturating_add(PORTS - 1);
        let listener = ports.clone().find_map(|port| TcpListener::bind((any, port)).ok());
        let listener = listener.ok_or_else(|| self.error(format!("the ports {ports:?} of this machine are taken")))?;
        listener.set_nonblocking(true).map_err(self.failed("cannot listen"))?;
        let mut sockets: Vec<Option<TcpStream>> = (0..*size).map(|_| None).collect();
        let mut places = vec![String::new(); *size];
        while sockets.iter().skip(1).any(Option::is_none) {
            let Some((mut socket, from)) = self.accept(&listener)? else {
                let missing: Vec<usize> = (1..*size).filter(|&rank| sockets[rank].is_none()).collect();
                let waited = self.options.timeout.as_secs();
                return Err(self.error(format!("ranks {missing:?} have not come within {waited} s")));
            };
            // Not of this job, or not even of this program: it is no concern of ours.
            let Some(greeting) = self.greeting(&mut socket) else { continue };
            let problem = if greeting.size != *size {
                Some(format!("it was told of {} ranks, rank 0 of {size}", greeting.size))
            } else if greeting.rank == 0 || greeting.rank >= *size || sockets[greeting.rank].is_some() {
                Some(format!("there are two processes of rank {}", greeting.rank))
            } else {
                None
            };
            if let Some(problem) = problem {
                let _ = writeln!(socket, "lasp {token} {problem}");
                return Err(self.error(format!("rank {} came from {from}, but {problem}", greeting.rank)));
            }
            if writeln!(socket, "lasp {token} ok").is_ok() {
                places[greeting.rank] = SocketAddr::new(from.ip(), greeting.port).to_string();
                sockets[greeting.rank] = Some(socket);
            }
        }
        let list = places[1..].join(" ");
        for socket in sockets.iter_mut().flatten() {
            writeln!(socket, "{list}").map_err(self.failed("cannot send the list of ranks"))?;
            self.ready(socket)?;
        }
        Ok(sockets)
    }

    /// Any other rank.
    fn enter(&self) -> Result<Vec<Option<TcpStream>>> {
        let Options { rank, size, token, timeout, .. } = self.options;
        let (mut first, listener, port) = self.reach_rank_0()?;
        first.set_read_timeout(Some(*timeout)).map_err(self.failed("cannot wait for the list of ranks"))?;
        let list = read_line(&mut first).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                self.error(format!("rank 0 has not sent the list of ranks within {} s", timeout.as_secs()))
            }
            _ => self.error(format!("rank 0 sent no list of ranks ({error}): it ended, or waited in vain for others")),
        })?;
        let places: Vec<SocketAddr> = list.split_whitespace().filter_map(|place| place.parse().ok()).collect();
        if places.len() != size - 1 {
            return Err(self.error(format!("rank 0 sent a list of {} ranks: {list}", places.len() + 1)));
        }
        let mut sockets: Vec<Option<TcpStream>> = (0..*size).map(|_| None).collect();
        for peer in 1..*rank {
            let place = places[peer - 1];
            let mut socket = TcpStream::connect_timeout(&place, *timeout)
                .map_err(self.failed(&format!("cannot reach rank {peer} at {place}")))?;
            writeln!(socket, "lasp {token} {rank} {size} {port}").map_err(self.failed("cannot greet"))?;
            sockets[peer] = Some(socket);
        }
        while sockets.iter().skip(rank + 1).any(Option::is_none) {
            let Some((mut socket, _)) = self.accept(&listener)? else {
                let missing: Vec<usize> = (rank + 1..*size).filter(|&rank| sockets[rank].is_none()).collect();
                return Err(self.error(format!("ranks {missing:?} have not connected to this one")));
            };
            if let Some(greeting) = self.greeting(&mut socket).filter(|g| g.rank > *rank && g.rank < *size) {
                sockets[greeting.rank] = Some(socket);
            }
        }
        sockets[0] = Some(first);
        sockets.iter().flatten().try_for_each(|socket| self.ready(socket))?;
        Ok(sockets)
    }

    /// Looks for rank 0 on its ports until it answers. Gives the connection, and this rank's own port for others.
    fn reach_rank_0(&self) -> Result<(TcpStream, TcpListener, u16)> {
        let Options { rank, size, port, token, timeout, .. } = self.options;
        let mut found = "nobody listens there".to_string();
        let mut addresses = Vec::new();
        for offset in (0..PORTS).cycle() {
            if offset == 0 {
                if self.late() {
                    let waited = timeout.as_secs();
                    return Err(self.error(format!(
                        "rank 0 did not answer on ports {port} to {} within {waited} s: {found}",
                        port.saturating_add(PORTS - 1)
                    )));
                }
                // A name may come to be known only once its machine is up.
                match self.resolve() {
                    Ok(resolved) => addresses = resolved,
                    Err(error) if self.late() => return Err(error),
                    Err(error) => found = error.to_string(),
                }
                thread::sleep(PAUSE);
            }
            let Some(port) = port.checked_add(offset) else { continue };
            for address in &addresses {
                let to = SocketAddr::new(*address, port);
                let mut socket = match TcpStream::connect_timeout(&to, ANSWER) {
                    Ok(socket) if is_with_itself(&socket) => continue,
                    Ok(socket) => socket,
                    Err(error) => {
                        found = error.to_string();
                        continue;
                    }
                };
                let any = match address.is_ipv6() {
                    true => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
                    false => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                };
                let own = TcpListener::bind((any, 0)).map_err(self.failed("cannot open a port"))?;
                own.set_nonblocking(true).map_err(self.failed("cannot listen"))?;
                let own_port = own.local_addr().map_err(self.failed("cannot listen"))?.port();
                let greeted = writeln!(socket, "lasp {token} {rank} {size} {own_port}");
                let answer = greeted
                    .and_then(|()| socket.set_read_timeout(Some(ANSWER.max(*timeout / 20))))
                    .and_then(|()| read_line(&mut socket));
                match answer {
                    Ok(line) => match line.strip_prefix(&format!("lasp {token} ")) {
                        Some("ok") => return Ok((socket, own, own_port)),
                        Some(problem) => return Err(self.error(problem.to_string())),
                        None => found = format!("what listens on port {port} is not of this job"),
                    },
                    Err(error) => found = format!("what listens on port {port} gives no answer: {error}"),
                }
            }
        }
        Err(self.error(found))
    }

    fn resolve(&self) -> Result<Vec<IpAddr>> {
        let Options { address, port, .. } = self.options;
        let found = (address.as_str(), *port).to_socket_addrs();
        let found: Vec<IpAddr> = found.map_err(self.failed("its name is not known"))?.map(|found| found.ip()).collect();
        // The same family on all ranks, where there are both.
        let fourth: Vec<IpAddr> = found.iter().copied().filter(IpAddr::is_ipv4).collect();
        Ok(if fourth.is_empty() { found } else { fourth })
    }

    /// The next to connect; none if it gets too late.
    fn accept(&self, listener: &TcpListener) -> Result<Option<(TcpStream, SocketAddr)>> {
        loop {
            match listener.accept() {
                Ok((socket, from)) => {
                    socket.set_nonblocking(false).map_err(self.failed("cannot accept"))?;
                    return Ok(Some((socket, from)));
                }
                Err(_) if self.late() => return Ok(None),
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn greeting(&self, socket: &mut TcpStream) -> Option<Greeting> {
        socket.set_read_timeout(Some(ANSWER)).ok()?;
        let line = read_line(socket).ok()?;
        let line = line.strip_prefix(&format!("lasp {} ", self.options.token))?;
        let mut numbers = line.split(' ');
        let mut number = || numbers.next()?.parse::<usize>().ok();
        Some(Greeting { rank: number()?, size: number()?, port: u16::try_from(number()?).ok()? })
    }

    fn ready(&self, socket: &TcpStream) -> Result<()> {
        socket.set_read_timeout(None).and_then(|()| socket.set_nodelay(true)).map_err(self.failed("cannot set up"))
    }
}

/// Whether nobody listens there, and a socket that got that very port for its own end has met itself: what TCP calls a simultaneous
/// open. It would read its own greeting.
fn is_with_itself(socket: &TcpStream) -> bool {
    socket.local_addr().is_ok_and(|own| socket.peer_addr().is_ok_and(|peer| peer == own))
}

/// Byte by byte, as frames follow on the same connection.
fn read_line(socket: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match socket.read(&mut byte)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ if byte[0] == b'\n' => return String::from_utf8(line).map_err(io::Error::other),
            _ if line.len() == LONGEST_LINE => return Err(io::Error::other("a line without an end")),
            _ => line.push(byte[0]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_socket_that_met_itself_is_found_out() {
        // Linux gives ends of connections even ports first, each as often as any other.
        let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok();
        let listener = (40_000..60_000).step_by(2).find_map(free).unwrap();
        let place = listener.local_addr().unwrap();
        assert!(!is_with_itself(&TcpStream::connect(place).unwrap()));
        drop(listener);
        match (0..300_000).find_map(|_| TcpStream::connect(place).ok()) {
            Some(socket) => assert!(is_with_itself(&socket)),
            None => println!("not tested: no socket met itself"),
        }
    }
}
