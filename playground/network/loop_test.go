package network

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// answer echoes what it reads, at the near end of the loop.
func answer(t *testing.T, l *Loop) {
	t.Helper()
	listener, err := l.Listen()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() { // ends with the listener
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { // ends with the connection
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
}

func openLoop(t *testing.T) *Loop {
	t.Helper()
	l, err := OpenLoop()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	answer(t, l)
	return l
}

// say sends a word and returns how long its echo took.
func say(c net.Conn, patience time.Duration) (time.Duration, error) {
	begun := time.Now()
	if err := c.SetDeadline(begun.Add(patience)); err != nil {
		return 0, err
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(c, make([]byte, 5))
	return time.Since(begun), err
}

func mustDial(t *testing.T, l *Loop) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", l.Address(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestLoopShapesPackets(t *testing.T) {
	t.Parallel()
	l := openLoop(t)
	c := mustDial(t, l)
	if took, err := say(c, 5*time.Second); err != nil || took > time.Second {
		t.Fatalf("whole: %s, %v", took, err)
	}
	if err := l.Shape(Both, Shape{Delay: 150 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	d := mustDial(t, l)
	if took := time.Since(begun); took < 300*time.Millisecond {
		t.Errorf("connected within %s over 300 ms", took)
	}
	if took, err := say(d, 5*time.Second); err != nil || took < 300*time.Millisecond {
		t.Errorf("delayed: %s, %v", took, err)
	}
	for _, dir := range []Direction{In, Out} {
		if err := l.Shape(Both, Shape{}); err != nil {
			t.Fatal(err)
		}
		if err := l.Shape(dir, Shape{Loss: 1}); err != nil {
			t.Fatal(err)
		}
		lost := mustSayNothing(t, c)
		if err := l.Shape(dir, Shape{}); err != nil {
			t.Fatal(err)
		}
		if !lost {
			t.Errorf("an echo came although nothing passes %s", dir)
		}
		// What was lost is sent again: the connection lives.
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Errorf("after the hole %s: %v", dir, err)
		}
	}
	if s := l.Stats(); s.Out.Lost == 0 || s.In.Lost == 0 {
		t.Errorf("stats %+v", s)
	}
}

func mustSayNothing(t *testing.T, c net.Conn) bool {
	t.Helper()
	_, err := say(c, 300*time.Millisecond)
	return errors.Is(err, os.ErrDeadlineExceeded)
}

func TestLoopForgetsConnections(t *testing.T) {
	t.Parallel()
	l := openLoop(t)
	old := mustDial(t, l)
	if _, err := say(old, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	l.Forget()
	if !mustSayNothing(t, old) {
		t.Error("a forgotten connection still works")
	}
	if _, err := say(mustDial(t, l), 5*time.Second); err != nil {
		t.Errorf("a new connection does not: %v", err)
	}
}

func TestLoopRefuses(t *testing.T) {
	t.Parallel()
	l, err := OpenLoop()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	listener, err := l.Listen()
	if err != nil {
		t.Fatal(err)
	}
	_ = listener.Close()
	begun := time.Now()
	if c, err := net.DialTimeout("tcp", l.Address(), 5*time.Second); err == nil {
		_ = c.Close()
		t.Error("connected to nobody")
	}
	if took := time.Since(begun); took > time.Second {
		t.Errorf("refused after %s", took)
	}
}
