package network

import (
	"testing"
	"time"
)

func TestLaneKeepsOrderWhenTheDelayShrinks(t *testing.T) {
	l, now := newLane(), time.Unix(0, 0)
	l.set(Shape{Delay: time.Second, Jitter: 300 * time.Millisecond})
	for i := range 100 {
		l.admit(now.Add(time.Duration(i)*time.Millisecond), []byte{byte(i)})
	}
	l.set(Shape{})
	l.admit(now.Add(100*time.Millisecond), []byte{100})
	if due, wait := l.take(now.Add(600 * time.Millisecond)); len(due) > 0 || wait <= 0 {
		t.Errorf("%d packets came early, next in %s", len(due), wait)
	}
	due, wait := l.take(now.Add(2 * time.Second))
	if len(due) != 101 || wait != 0 {
		t.Fatalf("%d packets came, next in %s", len(due), wait)
	}
	for i, data := range due {
		if data[0] != byte(i) {
			t.Fatalf("packet %d came in place %d", data[0], i)
		}
	}
}

func TestLaneDropsWhatTheRateCannotTake(t *testing.T) {
	l, now := newLane(), time.Unix(0, 0)
	l.set(Shape{Rate: 8e6}) // a megabyte per second: 100 ms are 100 KB
	for range 500 {
		l.admit(now, make([]byte, 1000))
	}
	due, _ := l.take(now.Add(50 * time.Millisecond))
	if len(due) != 50 {
		t.Errorf("%d packets in 50 ms, want 50", len(due))
	}
	rest, _ := l.take(now.Add(time.Second))
	if n := len(due) + len(rest); n < 100 || n > 102 {
		t.Errorf("%d packets fit the queue, want about 100", n)
	}
	if _, s := l.snapshot(); s.Overrun != 500-uint64(len(due)+len(rest)) || s.Packets != uint64(len(due)+len(rest)) {
		t.Errorf("stats %+v", s)
	}
}

func TestLaneBoundsWhatIsUnderWay(t *testing.T) {
	l, now := newLane(), time.Unix(0, 0)
	l.set(Shape{Delay: time.Hour})
	for range lineBytes/65536 + 10 {
		l.admit(now, make([]byte, 65536))
	}
	if l.bytes > lineBytes {
		t.Errorf("%d bytes are held", l.bytes)
	}
	if _, s := l.snapshot(); s.Overrun == 0 {
		t.Error("nothing was dropped")
	}
}

func TestPlanTellsItsFaults(t *testing.T) {
	good := testPlan("tnpl", 186)
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Plan){
		"prefix":         func(p *Plan) { p.Prefix = "with-dash" },
		"host":           func(p *Plan) { p.Host = p.gateway() },
		"overlap":        func(p *Plan) { p.Sites[1].Subnet = p.Sites[0].Subnet },
		"name":           func(p *Plan) { p.Sites[1].Machines[0].Name = "sky" },
		"address":        func(p *Plan) { p.Sites[1].Machines[0].Addr = p.Sites[1].router() },
		"pods":           func(p *Plan) { p.Sites[1].Machines[0].PodCIDR = p.ServiceCIDR },
		"service router": func(p *Plan) { p.ServiceVia = "nobody" },
	} {
		p := testPlan("tnpl", 186)
		spoil(&p)
		if p.Validate() == nil {
			t.Errorf("%s: a bad plan is valid", name)
		}
	}
}
