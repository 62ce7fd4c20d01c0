-- What the scripts about a lock KEYS[1] and its queue KEYS[2] share.
--
-- A queue is a string of lines "token ttl count", the first in it first: one command reads it, and
-- one writes it. Who only wants to hear that the lock is free has a line with its process's number
-- in the place of a token. A lock that others wait for has a mark behind its token, so that who releases it
-- while nobody waits need not look for a queue.

-- Whether a lock with the value `owner` is the token's.
local function is_of(owner, token)
  return owner == token or owner == token .. '!'
end

-- The channel of whoever has `token`.
local function inbox(token)
  return string.match(KEYS[1], '^[^:]*') .. ':inbox:' .. string.sub(token, 1, 32)
end

-- Raises the fencing counter, KEYS[3], to the server's clock in microseconds and to `seen`.
local function raise(seen)
  local time = redis.call('TIME')
  local floor = math.max(time[1] * 1000000 + time[2], seen)
  if tonumber(redis.call('GET', KEYS[3]) or 0) < floor then
    redis.call('SET', KEYS[3], string.format('%.0f', floor))
  end
end

-- Takes `count` fencing tokens and answers the first of them; 0 if none are wanted. An error is
-- answered too, not raised.
local function fence(count)
  if count == 0 then return 0 end
  local last = redis.pcall('INCRBY', KEYS[3], count)
  if type(last) ~= 'number' then return last end
  -- Below any clock in microseconds: the counter was lost.
  if last < 2 ^ 50 then
    raise(0)
    last = redis.call('INCRBY', KEYS[3], count)
  end
  -- From here on numbers are not exact.
  if last >= 2 ^ 53 then return { err = 'ERR the fencing counter is above 2^53' } end
  return last - count + 1
end

-- Keeps `queue` for as long as the queue before it, and for `place` milliseconds at least.
local function keep(queue, place)
  if queue == '' then
    redis.call('DEL', KEYS[2])
  elseif place and redis.call('PTTL', KEYS[2]) < tonumber(place) then
    redis.call('SET', KEYS[2], queue, 'PX', place)
  else
    redis.call('SET', KEYS[2], queue, 'KEEPTTL')
  end
end

-- Gives the free lock to the first in `queue` whose inbox has a subscriber, and answers its ttl and
-- the server's time. Whoever has no subscriber is gone and is taken out, as is a line that makes no
-- sense. If `asking` comes first, nobody is given the lock. A process that only wants to hear of it is
-- told that the lock is free if `releasing` gives it up, unless that is its own. The queue is kept for
-- `place` milliseconds at least, if that is given.
local function pass_on(queue, asking, releasing, place)
  while true do
    local _, last, token, ttl, count = string.find(queue, '^(%S+) (%d+) (%d+)\n')
    last = last or string.find(queue, '\n', 1, true)
    if not last then
      redis.call('DEL', KEYS[2])
      return nil
    end
    local process = token and #token == 32
    if token and token == asking or process and not releasing then
      keep(queue, place)
      return nil
    end
    queue = string.sub(queue, last + 1)
    if process then
      if token ~= string.sub(releasing, 1, 32) then
        redis.pcall('PUBLISH', inbox(token), 'f ' .. KEYS[1])
      end
    elseif token then
      local others = queue == '' and 0 or 1
      redis.call('SET', KEYS[1], others == 1 and token .. '!' or token, 'PX', ttl)
      local tokens = fence(tonumber(count))
      -- Whoever is given the lock without its tokens asks for them, and hears of the error.
      if type(tokens) ~= 'number' then tokens = 0 end
      local time = redis.call('TIME')
      local grant = 'g ' .. KEYS[1] .. ' ' .. token .. ' ' .. ttl .. ' ' .. time[1] .. ' ' .. time[2] .. ' '
        .. others .. ' ' .. string.format('%.0f', tokens) .. ' ' .. count
      local heard = redis.pcall('PUBLISH', inbox(token), grant)
      if type(heard) == 'number' and heard > 0 then
        keep(queue, place)
        return tonumber(ttl), time[1], time[2]
      end
      redis.call('DEL', KEYS[1])
    end
  end
end

-- Where the line of `token` in `queue` begins, and where it ends.
local function place_of(queue, token)
  local first = string.find('\n' .. queue, '\n' .. token .. ' ', 1, true)
  if first then return first, string.find(queue, '\n', first, true) or #queue end
end

-- Puts `token`, which wants the lock for `ttl` milliseconds and `count` fencing tokens with it, at
-- the end of `queue`, if it does not stand there yet, and sees to it that the queue is kept for
-- `place` milliseconds. Answers the queue.
local function stand(queue, token, ttl, count, place)
  local line = token .. ' ' .. ttl .. ' ' .. count .. '\n'
  if not queue then
    redis.call('SET', KEYS[2], line, 'PX', place)
    return line
  end
  if not place_of(queue, token) then
    redis.call('APPEND', KEYS[2], line)
    queue = queue .. line
  end
  if redis.call('PTTL', KEYS[2]) < tonumber(place) then
    redis.call('PEXPIRE', KEYS[2], place)
  end
  return queue
end

-- Takes `token` and its process out of `queue`, and answers whether others are left in it.
local function leave(queue, token)
  for _, who in ipairs({ token, string.sub(token, 1, 32) }) do
    local first, last = place_of(queue, who)
    if first then
      queue = string.sub(queue, 1, first - 1) .. string.sub(queue, last + 1)
      keep(queue)
    end
  end
  return queue ~= ''
end
