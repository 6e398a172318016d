package identity

import "time"

// contact tells what an answer that was kept is worth.
//
// Kept answers carry the time at which they were asked for. While the link is
// up, an answer from before it came up does not count: rights may have been
// revoked meanwhile, so the cloud is asked again before anything is answered.
type contact struct {
	online func() bool
	since  func() time.Time
}

func newContact(online func() bool, since func() time.Time) contact {
	if online == nil {
		online = func() bool { return true }
	}
	if since == nil {
		since = func() time.Time { return time.Time{} }
	}
	return contact{online: online, since: since}
}

// outdated reports whether an answer that was asked for at the given time
// must be asked for again before it is used.
func (c contact) outdated(asked time.Time) bool { return c.online() && asked.Before(c.since()) }
