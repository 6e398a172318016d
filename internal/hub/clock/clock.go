package clock

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/yurt-edge/yurt/internal/atomicfile"
)

const (
	// tolerance is how far the machine's clock may be from the cloud's and
	// still be taken for right. It is also how slow an answer may be that
	// tells the time.
	tolerance = time.Minute
	// saveEvery spares the flash: four writes of a page a day. A node that
	// loses its power begins at most that much too early.
	saveEvery = 6 * time.Hour
	// stepPoll is how soon a step of the machine's clock is noticed.
	stepPoll = 10 * time.Second
)

// Source reads the machine's clocks: the time of day, which anybody may set,
// and the time since boot, which nobody sets and which counts sleep too.
type Source func() (wall time.Time, up time.Duration)

// Config is what a Clock needs. All but Path have defaults.
type Config struct {
	// Path is the file of the floor.
	Path string
	// Built is when the program was made; that of its last commit if zero.
	Built  time.Time
	Source Source       // the machine's clocks if nil
	Log    *slog.Logger // slog.Default() if nil
}

// Clock tells the time. It is safe for concurrent use. A nil *Clock is the
// machine's own clock, taken for right.
type Clock struct {
	cfg  Config
	boot string

	mu    sync.Mutex // guards the following
	floor mark
	heard mark   // the cloud's time; zero until it is heard
	saved record // what the file holds
}

// mark is a moment, and the time since boot when it was now.
type mark struct {
	at time.Time
	up time.Duration
}

// now is the moment that the mark has become.
func (m mark) now(up time.Duration) time.Time { return m.at.Add(up - m.up) }

// record is the file.
type record struct {
	Floor time.Time `json:"floor"`
}

// Open returns a Clock that begins at the floor of the file. A file that is
// absent or unusable costs the floor, never the start.
func Open(cfg Config) *Clock {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Source == nil {
		cfg.Source = machine
	}
	if cfg.Built.IsZero() {
		cfg.Built = committed()
	}
	c := &Clock{cfg: cfg}
	if id, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		c.boot = strings.TrimSpace(string(id))
	}
	if err := c.load(); err != nil && !errors.Is(err, os.ErrNotExist) {
		cfg.Log.Warn("time floor is unusable, beginning without", "err", err)
	}
	wall, up := cfg.Source()
	c.floor = mark{later(cfg.Built, c.saved.Floor), up}
	if wall.Before(c.floor.at) {
		cfg.Log.Warn("the machine's clock is behind", "clock", wall, "floor", c.floor.at)
	}
	return c
}

func machine() (time.Time, time.Duration) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // Linux has had this clock since 2.6.39
	}
	return time.Now(), time.Duration(ts.Nano())
}

// committed returns the time of the commit that the program was built from.
func committed() time.Time {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return time.Time{}
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.time" {
			t, err := time.Parse(time.RFC3339, s.Value)
			if err == nil {
				return t
			}
		}
	}
	return time.Time{}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// Now returns the time, without a monotonic reading: the cloud's once it was
// heard, or else the later of the machine's and the floor.
func (c *Clock) Now() time.Time {
	if c == nil {
		return time.Now().Round(0)
	}
	wall, up := c.cfg.Source()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nowLocked(wall, up)
}

func (c *Clock) nowLocked(wall time.Time, up time.Duration) time.Time {
	if c.heard.at.IsZero() {
		return later(wall.Round(0), c.floor.now(up))
	}
	now := c.heard.now(up)
	if d := wall.Sub(now); -tolerance <= d && d <= tolerance {
		// They agree, and the machine's has the finer grain.
		return wall.Round(0)
	}
	return now
}

// Since returns the time that has passed since t. It is negative for a t that
// is still to come.
func (c *Clock) Since(t time.Time) time.Duration { return c.Now().Sub(t) }

// Until returns the time that is left until t.
func (c *Clock) Until(t time.Time) time.Duration { return t.Sub(c.Now()) }

// Aged reports whether what was noted at t counts no more: it is older than
// most, or dated so far ahead that the clock was wrong by which it was noted,
// and nobody knows its age.
func (c *Clock) Aged(t time.Time, most time.Duration) bool {
	// What was written before the power went may be later than the floor.
	ahead := tolerance
	if !c.Sound() {
		ahead += saveEvery
	}
	age := c.Since(t)
	return age > most || age < -ahead
}

// Sound reports whether the cloud has been heard since the start, so that Now
// is no guess.
func (c *Clock) Sound() bool {
	if c == nil {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.heard.at.IsZero()
}

// Cloud returns the cloud's time as it was heard, whatever the machine's clock
// says, and whether it was heard since the start.
func (c *Clock) Cloud() (now time.Time, heard bool) {
	if c == nil {
		return time.Now().Round(0), true
	}
	_, up := c.cfg.Source()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.heard.now(up), !c.heard.at.IsZero()
}

// Floor returns the moment before which it cannot be. It moves on with time.
func (c *Clock) Floor() time.Time {
	if c == nil {
		return time.Now().Round(0)
	}
	_, up := c.cfg.Source()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.floor.now(up)
}

// Machine returns the time by the machine's own clock, for those who will
// compare it with that clock.
func (c *Clock) Machine() time.Time {
	if c == nil {
		return time.Now().Round(0)
	}
	wall, _ := c.cfg.Source()
	return wall.Round(0)
}

// Uptime returns an identifier of the machine's current boot and the time since
// it began. Within a boot, a difference of two is right whatever happens to the
// clocks. The identifier is empty when there is none.
func (c *Clock) Uptime() (boot string, up time.Duration) {
	if c == nil {
		return "", 0
	}
	_, up = c.cfg.Source()
	return c.boot, up
}

// Saw takes a proof that t has passed.
func (c *Clock) Saw(t time.Time) {
	if c == nil {
		return
	}
	_, up := c.cfg.Source()
	c.mu.Lock()
	defer c.mu.Unlock()
	// The cloud's own word counts for more: what it issued while its clock
	// was ahead proves nothing.
	if c.heard.at.IsZero() && t.After(c.floor.now(up)) {
		c.floor = mark{t, up}
	}
}

// Hear takes the time that the API server gave in an answer over a verified
// connection, and how long that took. It is the only proof that also lowers the
// floor: whoever set that too high was wrong.
func (c *Clock) Hear(date time.Time, took time.Duration) {
	if c == nil || date.IsZero() || took < 0 || took > tolerance/2 {
		return
	}
	wall, up := c.cfg.Source()
	c.mu.Lock()
	first := c.heard.at.IsZero()
	was := c.nowLocked(wall, up)
	// The header's grain is a second, and it was written at some moment
	// between question and answer.
	now := date.Add((took + time.Second) / 2)
	c.heard = mark{now, up}
	if d := now.Sub(c.floor.now(up)); d > 0 || d < -tolerance {
		c.floor = mark{now, up}
	}
	behind := now.Sub(c.saved.Floor)
	c.mu.Unlock()
	if d := was.Sub(now); first && (d < -tolerance || d > tolerance) {
		c.cfg.Log.Warn("the clock was wrong; the cloud's time is used from now on", "ahead", d, "clock", wall, "cloud", now)
	}
	if first && behind > saveEvery || behind < -tolerance {
		c.save()
	}
}

// Skew returns by how much the machine's clock is ahead of the cloud's, zero
// while they agree to the minute, and whether that is known.
func (c *Clock) Skew() (ahead time.Duration, known bool) {
	if c == nil {
		return 0, false
	}
	wall, up := c.cfg.Source()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.heard.at.IsZero() {
		return 0, false
	}
	if d := wall.Round(0).Sub(c.heard.now(up)); d < -tolerance || d > tolerance {
		return d.Round(time.Second), true
	}
	return 0, true
}

// Run keeps the floor on disk and notices steps of the machine's clock, until
// ctx ends. It returns nil.
func (c *Clock) Run(ctx context.Context) error {
	defer c.save()
	tick := time.NewTicker(stepPoll)
	defer tick.Stop()
	wall, up := c.cfg.Source()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		nextWall, nextUp := c.cfg.Source()
		step := nextWall.Round(0).Sub(wall.Round(0)) - (nextUp - up)
		wall, up = nextWall, nextUp
		if step < -stepPoll || step > stepPoll {
			c.cfg.Log.Info("the machine's clock was set", "by", step.Round(time.Millisecond), "now", wall)
		}
		c.mu.Lock()
		due := c.floor.now(up).Sub(c.saved.Floor) > saveEvery
		c.mu.Unlock()
		if due {
			c.save()
		}
	}
}

func (c *Clock) load() error {
	data, err := os.ReadFile(c.cfg.Path)
	if err != nil {
		return fmt.Errorf("read time floor: %w", err)
	}
	if err := json.Unmarshal(data, &c.saved); err != nil {
		return fmt.Errorf("read time floor %s: %w", c.cfg.Path, err)
	}
	return nil
}

func (c *Clock) save() {
	_, up := c.cfg.Source()
	c.mu.Lock()
	next := record{Floor: c.floor.now(up).UTC().Truncate(time.Second)}
	c.mu.Unlock()
	data, err := json.Marshal(next)
	if err == nil {
		err = atomicfile.WriteFile(c.cfg.Path, append(data, '\n'), 0o600)
	}
	if err != nil {
		c.cfg.Log.Warn("time floor is not saved", "err", err)
		return
	}
	c.mu.Lock()
	c.saved = next
	c.mu.Unlock()
}
